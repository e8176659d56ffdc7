"""Doge: dynamic-mask attention, residuals with learned scales, and a retrieval of tiny experts if wanted."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, LM, STREAMING, Card, Size, register
from attnlab.models.skeletons.decoder import Decoder, DecoderBlock, SwiGLU


class DomainExperts(SwiGLU):
    """SwiGLU and, beside it, the few of many rank-one experts whose two-part keys suit the token (CDMoE).

        y = SwiGLU(x) + Σ_e softmax(s)_e · silu(down_e · x) · up_e        the `active` experts e = (i, j) of largest s
        s_ij = a_i + b_j        (a, b) = Wr x, √experts scores each

    x (B, N, C) → the same. Cost per token 2·C·√experts for the keys and 2·C·active for the experts. Source: arXiv
    2412.11834 (transformers' `DogeCDMoE`).

    Args:
        hidden: of the SwiGLU.
        experts, active: how many there are, rounded down to a square, and how many a token uses.
        variant: "release" takes a and b from where the authors' reshape puts them: rows of other tokens, later ones and
            other texts' among them, so neither causal nor free of the batch. It is there for their weights.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        experts: int = 16384,
        active: int = 64,
        variant: Literal["paper", "release"] = "paper",
        bias: bool = False,
    ) -> None:
        super().__init__(dim, hidden, bias=bias)
        if not 1 <= active <= math.isqrt(max(experts, 0)) ** 2:
            raise ValueError(f"active must be between 1 and experts = {experts}, got {active}")
        if variant not in ("paper", "release"):
            raise ValueError(f"variant must be 'paper' or 'release', got {variant!r}")
        self.keys, self.active, self.variant = math.isqrt(experts), active, variant
        self.router = nn.Linear(dim, 2 * self.keys, bias=False)
        self.down, self.up = nn.Embedding(experts, dim), nn.Embedding(experts, dim)
        for table in (self.down, self.up):
            nn.init.normal_(table.weight, std=0.02)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices `(T, active)` of the experts for tokens `(T, C)`."""
        scores = self.router(x)
        a, b = scores.view(2, len(x), -1) if self.variant == "release" else scores.chunk(2, -1)
        # The best sums are made of the best terms.
        few = min(self.active, self.keys)
        (a, i), (b, j) = a.topk(few), b.topk(few)
        best = (a[:, :, None] + b[:, None]).flatten(1).topk(self.active)
        pairs = (i[:, :, None] * self.keys + j[:, None]).flatten(1)
        return best.values.softmax(-1), pairs.gather(1, best.indices)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, chosen = self.choose(tokens)
        inner = silu(torch.einsum("tc,tec->te", tokens, self.down(chosen))) * weights
        return super().forward(x) + torch.einsum("te,tec->tc", inner, self.up(chosen)).view_as(x)


class DogeBlock(DecoderBlock):
    """x = α ⊙ x + mixer(norm1(x)), then x = β ⊙ x + mlp(norm2(x)), with learned α, β (C), 1 at first."""

    def __init__(self, dim: int, mixer: nn.Module, mlp: nn.Module, **keywords: Any) -> None:
        super().__init__(dim, mixer, mlp, **keywords)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, *, state: Any = None) -> Any:
        if state is None:
            y = self.mixer(self.norm1(x))
        else:
            y, state = self.mixer(self.norm1(x), state=state)
        x = self.scale1 * x + y
        x = self.scale2 * x + self.mlp(self.norm2(x))  # type: ignore[misc]
        return x if state is None else (x, state)


def _size(params: int, dim: int, depth: int, heads: int) -> Size:
    kv_heads = heads // 2
    return Size(params, dict(vocabulary=32768, dim=dim, depth=depth, heads=heads, kv_heads=kv_heads, hidden=2 * dim))


# Parameter counts: transformers' `DogeForCausalLM` at the released configurations, with tied embeddings.
SIZES = {
    "doge_20m": _size(13_118_728, 256, 8, 2),
    "doge_60m": _size(54_571_552, 512, 16, 4),
    "doge_160m": _size(152_676_168, 768, 24, 6),
    "doge_320m": _size(335_750_272, 1024, 32, 8),
}


@register(
    Card(
        name="doge",
        title="Trainable Dynamic Mask Sparse Attention",
        paper="2508.02124",
        system="dma",
        family="language",
        kind=LM,
        capabilities=CAUSAL_SELF | ANY_LENGTH | STREAMING,
        cost="N·w",
        state="layers",
        sample=dict(vocabulary=64, dim=32, depth=2, heads=4, kv_heads=2, hidden=48, keep=5, tied=False),
        sizes=SIZES,
    )
)
class Doge(Decoder):
    """A language model with dynamic-mask attention: `build("doge_20m")`, or `build("doge", vocabulary=…, dim=…, …)`.

        x = α ⊙ x + DynamicMask(RMSNorm x)        x = β ⊙ x + mlp(RMSNorm x)

    Logits, state and `generate` are the `Decoder`'s, and so are the keywords not named here. Decoding keeps `keep` keys
    per layer however long the text. Source: arXiv 2508.02124.

    Args:
        keep, variant: of `DynamicMask`.
        bias, mlp_bias: in the projections of the mixers and of the mlps.
        experts: how many experts each layer retrieves from (16384 in the released mixtures); 0 for SwiGLU alone.
        active, expert_variant: of `DomainExperts`.
    """

    def __init__(
        self,
        *,
        dim: int,
        hidden: int,
        depth: int,
        keep: int = 2048,
        variant: Literal["paper", "release"] = "paper",
        experts: int = 0,
        active: int = 64,
        expert_variant: Literal["paper", "release"] = "paper",
        bias: bool = False,
        mlp_bias: bool = False,
        tied: bool = True,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        **keywords: Any,
    ) -> None:
        def mlp(_: int) -> nn.Module:
            if not experts:
                return SwiGLU(dim, hidden, bias=mlp_bias)
            return DomainExperts(dim, hidden, experts=experts, active=active, variant=expert_variant, bias=mlp_bias)

        def norm(width: int) -> nn.Module:
            return nn.RMSNorm(width, eps=norm_eps)

        options = dict(keep=keep, variant=variant, bias=bias, dropout=dropout, qk_norm=norm)
        super().__init__(
            dim=dim, depth=depth, mixer="dynamic_mask", mixer_options=options, mlp=mlp, tied=tied, norm_eps=norm_eps,
            **keywords,
        )  # fmt: skip
        plain: list[Any] = list(self.blocks)
        self.blocks = nn.ModuleList(DogeBlock(dim, block.mixer, block.mlp, norm=norm) for block in plain)
