"""Kimi Linear: three layers of Kimi Delta Attention to one of latent softmax attention, with a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, LM, STREAMING, Card, Size, register
from attnlab.models.skeletons.decoder import Decoder, SwiGLU
from attnlab.nn.channel.moe import MoE
from attnlab.nn.linear.kda import KimiDeltaAttention
from attnlab.nn.softmax.mla import LatentAttention

# At the authors' configuration, without the routers' balancing biases, which are buffers. About 3 billion of the
# parameters work on each token.
SIZES = {
    "kimi_linear_48b_a3b": Size(
        49_122_675_072,
        dict(vocabulary=163840, dim=2304, depth=27, heads=32, head_dim=128, full=(3, 7, 11, 15, 19, 23, 26),
             hidden=9216, experts=256, active=8, expert_hidden=1024),
    ),
}  # fmt: skip


@register(
    Card(
        name="kimi_linear",
        title="Kimi Linear: An Expressive, Efficient Attention Architecture",
        paper="2510.26692",
        system="kda",
        family="language",
        kind=LM,
        capabilities=CAUSAL_SELF | ANY_LENGTH | STREAMING,
        cost="N²",
        state="layers",
        sample=dict(
            vocabulary=64, dim=32, depth=4, heads=2, head_dim=8, hidden=48, experts=4, active=2, expert_hidden=16,
            rank=8, shared_dim=4,
        ),
        sizes=SIZES,
        compiles="the number of tokens that each expert gets depends on what the router reads",
    )
)  # fmt: skip
class KimiLinear(Decoder):
    """A language model that remembers most of its text in states of constant size: `build("kimi_linear_48b_a3b")`.

    x = x + mixer(RMSNorm x), x = x + mlp(RMSNorm x) in each layer: the mixer is Kimi Delta Attention, or in the layers
    `full` latent attention without positions; the mlp is SwiGLU in the first `dense` layers and then a mixture of
    experts. Logits, state and `generate` are the `Decoder`'s. Source: arXiv 2510.26692.

    Args:
        heads, head_dim: of every mixer, and so the widths of keys and values.
        full: the layers (from 0) with latent attention; every fourth if None.
        rank, shared_dim: of latent attention.
        kda_heads, kda_head_dim, conv: of Kimi Delta Attention, where they differ from `heads` and `head_dim`.
        value_dim: of latent attention, where it differs from `head_dim`.
        hidden, dense: the width of SwiGLU, and how many layers have it.
        experts, active, expert_hidden, shared_experts, scaling, normalise, groups, active_groups: of `MoE`.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        dim: int,
        depth: int,
        heads: int,
        head_dim: int,
        hidden: int,
        experts: int,
        active: int,
        expert_hidden: int,
        full: Sequence[int] | None = None,
        rank: int = 512,
        shared_dim: int = 64,
        value_dim: int | None = None,
        kda_heads: int | None = None,
        kda_head_dim: int | None = None,
        conv: int = 4,
        dense: int = 1,
        shared_experts: int = 1,
        scaling: float = 2.446,
        normalise: bool = True,
        groups: int = 1,
        active_groups: int = 1,
        norm_eps: float = 1e-5,
        length: int | None = None,
        tied: bool = False,
    ) -> None:
        full = range(3, depth, 4) if full is None else full
        if any(not 0 <= i < depth for i in full):
            raise ValueError(f"full names layers from 0 to depth − 1 = {depth - 1}, got {tuple(full)}")

        def mixer(layer: int) -> nn.Module:
            if layer in full:
                return LatentAttention(
                    dim, heads=heads, head_dim=head_dim, shared_dim=shared_dim, value_dim=value_dim or head_dim,
                    rank=rank, causal=True,
                )  # fmt: skip
            return KimiDeltaAttention(
                dim, heads=kda_heads or heads, head_dim=kda_head_dim or head_dim, conv=conv, norm_eps=norm_eps
            )

        def mlp(layer: int) -> nn.Module:
            if layer < dense:
                return SwiGLU(dim, hidden)
            return MoE(
                dim, expert_hidden, experts=experts, active=active, shared=shared_experts, scaling=scaling,
                normalise=normalise, groups=groups, active_groups=active_groups,
            )  # fmt: skip

        super().__init__(
            vocabulary=vocabulary, dim=dim, depth=depth, heads=heads, head_dim=head_dim, mixer=mixer, mlp=mlp,
            position="none", length=length, tied=tied, norm_eps=norm_eps,
        )  # fmt: skip
