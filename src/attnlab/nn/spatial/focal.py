"""Focal modulation: contexts of growing reach, gated per place, multiplied into the query."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, FEATURES, Card, register
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.fused import linear

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@register(
    Card(
        name="focal",
        title="Focal Modulation Networks",
        paper="2203.11926",
        system="focalnet",
        family="spatial",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
    )
)
class FocalModulation(nn.Module):
    """Let each place read its surroundings at several ranges at once, in linear time and without any pairwise score.

        query, context₀, gates = split(Wf x)                 C, C and levels + 1 channels
        context_l = GELU(depthwise_{kₗ}(context_{l-1}))      kₗ = window + factor·(l-1), zero padding
        everywhere = GELU(mean over places of the last context)
        y = Wo (query ⊙ Wm (Σₗ gate_l · context_l + gate_{levels+1} · everywhere))

    `(B, C, *spatial)` to the same, any size. A gate is one number per place and level, raw: no activation bounds it.
    `levels=0` leaves gated global average modulation. Cost: O(N·C·(4C + Σ kₗ²)) for N places in 2-D.
    Fastest on channels-last memory, in which linear layers and convolutions meet without a transpose.
    Source: arXiv 2203.11926.

    Args:
        window: kernel of the first level, odd; factor: growth of the kernel per level, even.
        normalize: divide the sum of contexts by levels + 1 (the authors' FocalNet-L with four levels).
        post_norm: layer norm on query ⊙ modulator, before Wo (the authors' FocalNet-H).
        spatial: number of spatial axes, 1 to 3.
    """

    def __init__(
        self,
        dim: int,
        *,
        levels: int = 2,
        window: int = 3,
        factor: int = 2,
        normalize: bool = False,
        post_norm: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        spatial: int = 2,
    ) -> None:
        super().__init__()
        if levels < 0:
            raise ValueError(f"levels must be at least 0, got {levels}")
        if window < 1 or window % 2 == 0 or factor < 0 or factor % 2:
            raise ValueError(f"window must be odd and factor even, to keep the map's size; got {window} and {factor}")
        if spatial not in _CONVOLUTIONS:
            raise ValueError(f"spatial must be 1, 2 or 3, got {spatial}")
        self.dim, self.levels, self.normalize, self.spatial = dim, levels, normalize, spatial
        self.wqcg = nn.Linear(dim, 2 * dim + levels + 1, bias=bias)  # rows: query | context | gates
        kernels = [window + factor * level for level in range(levels)]
        conv = _CONVOLUTIONS[spatial]
        self.convs = nn.ModuleList(
            DepthwiseConv(dim, k, bias=False)
            if spatial == 2
            else conv(dim, dim, k, padding=k // 2, groups=dim, bias=False)
            for k in kernels
        )
        self.wm = nn.Linear(dim, dim, bias=bias)
        self.norm = nn.LayerNorm(dim) if post_norm else None
        self.wo = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def gates(self, x: Tensor) -> Tensor:
        """The gates `(B, levels + 1, *spatial)` that `x` opens: a map per level, the last for the whole map's mean."""
        weight, bias = self.wqcg.weight[2 * self.dim :], self.wqcg.bias
        return F.linear(x.movedim(1, -1), weight, None if bias is None else bias[2 * self.dim :]).movedim(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != self.spatial + 2 or x.shape[1] != self.dim or 0 in x.shape:
            axes = ", ".join("DHW"[-self.spatial :])
            raise ValueError(f"x must be (B, {self.dim}, {axes}) and not empty, got {tuple(x.shape)}")
        query, context, gates = linear(x.movedim(1, -1), self.wqcg).split((self.dim, self.dim, self.levels + 1), -1)
        if self.normalize:
            gates = gates / (self.levels + 1)
        contexts = []
        for conv in self.convs:
            context = F.gelu(conv(context.movedim(-1, 1))).movedim(1, -1)
            contexts.append(context)
        contexts.append(F.gelu(context.mean(tuple(range(1, x.ndim - 1)), keepdim=True)))
        total = contexts[0] * gates[..., :1]
        for level in range(1, self.levels + 1):
            total = torch.addcmul(total, contexts[level], gates[..., level, None])
        y = query * linear(total, self.wm)
        y = y if self.norm is None else self.norm(y)
        return self.dropout(linear(y, self.wo)).movedim(-1, 1)
