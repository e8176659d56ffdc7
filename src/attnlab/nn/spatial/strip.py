"""Strip self-attention (S2AFormer): one channel per head says what is alike, on keys of a coarser map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, FEATURES, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.channel.squeeze_excite import SqueezeExcite
from attnlab.nn.mechanism import OnGrid, check_grid, check_heads, join_heads, split_heads
from attnlab.nn.spatial.thin import attend_thin

_TITLE = "S2AFormer: Strip Self-Attention for Efficient Vision Transformer"
REDUCTIONS = ("dwconv", "conv", "avgpool")


@register(
    Card(
        name="strip_attention",
        title=_TITLE,
        paper="2505.22195",
        system="s2aformer",
        family="spatial",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_GRID,
        cost="N²/r²",
        growth=2.0,
        sample={"heads": 4, "ratio": 2},
    )
)
class StripAttention(OnGrid):
    """Attention whose scores cost one multiplication: queries and keys are a single channel ("strip") of each head.

        z = norm(conv_{r×r}(x));  y = Wo softmax(q kᵀ / √qk_dim) v        q = Wq x, (k, v) = (Wk, Wv) z

    x (B, H·W, C) with grid=(H, W) → the same shape; q and k have `qk_dim` channels per head, v has C/heads. The map of
    keys is `ratio` times coarser on each side (filled up with zeros), at ratio 1 it is x itself. Before the softmax
    the scores of a head have rank `qk_dim`: with one channel all its queries order the keys alike, or the other way
    round. With qk_dim = C/heads and ratio 1 it is multi-head attention.
    Cost: N·C·h + NC² + N'(C·h + C² + r²C) + N·N'·(h + C) multiply-adds, N' = N/r². Source: arXiv 2505.22195, which has
    no public code; what it leaves open is chosen here: biases, and a scale of 1 for one channel.

    Args:
        reduction: how keys are made coarser: "dwconv", a depth-wise convolution, "conv", a full one, or "avgpool".
        shared: one map of scores for all heads instead of one for each.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        ratio: int = 1,
        qk_dim: int = 1,
        reduction: str = "dwconv",
        shared: bool = False,
        bias: bool = True,
        causal: bool = False,
    ) -> None:
        if causal:
            raise ValueError("causal must be False: keys are of the whole map")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        for name, value in (("ratio", ratio), ("qk_dim", qk_dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        super().__init__(dim)
        check_heads(dim, heads)
        self.heads, self.ratio, self.qk_dim = heads, ratio, qk_dim
        self.maps = 1 if shared else heads  # of scores
        self.wq = nn.Linear(dim, self.maps * qk_dim, bias=bias)
        self.wkv = nn.Linear(dim, self.maps * qk_dim + dim, bias=bias)  # rows: k | v
        self.wo = nn.Linear(dim, dim, bias=bias)
        self.reduce: nn.Module | None = None
        self.norm: nn.Module | None = None
        if ratio > 1:
            groups = dim if reduction == "dwconv" else 1
            pooled = reduction == "avgpool"
            self.reduce = nn.AvgPool2d(ratio) if pooled else nn.Conv2d(dim, dim, ratio, ratio, groups=groups)
            self.norm = nn.LayerNorm(dim, eps=1e-6)

    def coarse(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The tokens of which keys and values are made, (B, N', C)."""
        if self.reduce is None or self.norm is None:
            return x
        maps = x.unflatten(1, grid)
        below, right = -grid[0] % self.ratio, -grid[1] % self.ratio
        maps = F.pad(maps, (0, 0, 0, right, 0, below)) if below or right else maps
        maps = self.reduce(maps.permute(0, 3, 1, 2))
        return self.norm(maps.permute(0, 2, 3, 1).flatten(1, 2))

    def qkv(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, S, N, qk_dim), k (B, S, N', qk_dim) and v (B, S, N', C/S), S the maps of scores."""
        k, v = self.wkv(self.coarse(x, grid)).split((self.maps * self.qk_dim, self.dim), -1)
        q, k, v = (split_heads(t, self.maps) for t in (self.wq(x), k, v))
        return q, k, v

    def over_grid(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        height, width = grid
        return self.wo(join_heads(attend_thin(*self.qkv(x, (height, width)))))

    def weights(self, x: Tensor, *, grid: tuple[int, ...] | None = None) -> Tensor:
        """The weights (B, S, N, N') with which values are mixed: to look at."""
        height, width = check_grid(grid, x.shape[1], axes=2)
        q, k, _ = self.qkv(x, (height, width))
        return torch.softmax(q @ k.mT * self.qk_dim**-0.5, -1)


@register(
    Card(
        name="local_interaction",
        title=_TITLE,
        paper="2505.22195",
        system="s2aformer",
        family="spatial",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
    )
)
class LocalInteraction(nn.Module):
    """What coarse attention loses at boundaries: a convolution between two projections, and a gate per channel.

        z = W2 gelu(dwconv3×3(W1 x));  y = z · σ(V2 relu(V1 mean(z)))        V1 to C/4

    `(B, C, H, W)` to the same, any size. Cost: 4NC² + 18NC. Source: arXiv 2505.22195, whose text says what it is for
    and not exactly what it is: this form is chosen here. gate=False leaves the second factor out.
    """

    def __init__(self, dim: int, *, gate: bool = True) -> None:
        super().__init__()
        self.dim = dim
        self.w1, self.w2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.gate = SqueezeExcite(dim, activation=nn.ReLU) if gate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        x = self.conv(self.w1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.gate(self.w2(F.gelu(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
