"""Attention between spikes: queries, keys and values of 0 and 1, sums in place of softmax."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnlab.cards import ANY_LENGTH, NONCAUSAL_SELF, PERMUTATION_EQUIVARIANT, TOKENS, Card, register
from attnlab.nn.mechanism import Mechanism, check_heads, join_heads
from attnlab.nn.spiking.lif import LIF
from attnlab.nn.spiking.token_norm import TokenNorm
from attnlab.patterns import Pattern


@register(
    Card(
        name="spiking_attention",
        title="Spikformer V2: Join the High Accuracy Club on ImageNet with an SNN Ticket",
        paper="2401.02020",
        system="spikformer_v2",
        family="spiking",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | PERMUTATION_EQUIVARIANT | ANY_LENGTH,
        cost="N",
        growth=1.0,
        sample=dict(heads=4, threshold=0.1, read_threshold=0.1),
    )
)
class SpikingSelfAttention(Mechanism):
    """Attention of spiking networks (SSA): who fires together is counted, and nothing is multiplied but by 0 and 1.

        q, k, v = LIF(BN(W x))        z = LIF_½(q (kᵀ v) / 8)        y = LIF(BN(Wo z + b))

    x `(T, B, N, C)`, T steps of spikes, or `(B, N, C)`, a single step, → y of the same shape in {0, 1}. Without a
    softmax kᵀ v comes first: O(N·C²/H) per step, and in whole numbers, so that the order changes nothing. The factor is
    the same at any width of the heads; the neurons begin at rest in each call (`lif`); norms take the steps together.
    Source: arXiv 2401.02020 (ZK-Zhou/spikformer).

    Args:
        dim: C.
        heads: that divide C.
        scale: of the counts. threshold: of all neurons but those that read the counts, `read_threshold`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        scale: float = 0.125,
        threshold: float = 1.0,
        read_threshold: float = 0.5,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        if causal:
            raise ValueError("causal must be False: SpikingSelfAttention lets every token count all others")
        check_heads(dim, heads)
        self.heads, self.scale = heads, scale
        self.wqkv, self.norm = nn.Linear(dim, 3 * dim, bias=False), TokenNorm(3 * dim)
        self.wo, self.norm_o = nn.Linear(dim, dim), TokenNorm(dim)
        self.lif, self.lif_o = LIF(threshold=threshold), LIF(threshold=threshold)
        self.lif_read = LIF(threshold=read_threshold)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Spikes q, k and v, each `(T·B, H, N, C/H)`, of `(T, B, N, C)`."""
        spikes = self.lif(self.norm(self.wqkv(x))).flatten(0, 1)
        q, k, v = spikes.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: object = None,
    ) -> Tensor:
        steps = x if x.dim() == 4 else x.unsqueeze(0)
        self.check(steps.flatten(0, 1) if x.dim() in (3, 4) else x)
        self.refuse(context=context, pattern=pattern, state=state)
        q, k, v = self.project(steps)
        counts = torch.mul(q @ (k.mT @ v), self.scale)
        z = self.lif_read(join_heads(counts).view(steps.shape))
        return self.lif_o(self.norm_o(self.wo(z))).view(x.shape)
