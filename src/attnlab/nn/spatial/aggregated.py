"""Attention of a window around each token and of a pooled map together, with cosine scores (TransNeXt)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import ANY_GRID, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.fused import linear
from attnlab.nn.kept import Kept
from attnlab.nn.mechanism import Mechanism, check_grid, check_heads, join_heads, split_heads
from attnlab.nn.softmax.mixture_of_heads import HeadRouter
from attnlab.nn.spatial.bands import window_scores, window_sum
from attnlab.patterns import Pattern

Grid = tuple[int, int]


def relative_places(
    grid: Grid,
    keys: Grid,
    trained: Grid | None = None,
    *,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """How far each token of a `grid` lies from each cell of a pooled map of `keys`: (index (N·P), table (T, 2)).

    `table[index]` holds the offsets on both axes, of 8 for the whole of the `trained` grid, on a log scale; offsets
    that occur often stand in the table once. A grid of one row or column, which the authors divide by 0, has offset 0.
    """
    tables, indices = [], []
    for size, cells, whole in zip(grid, keys, trained or grid, strict=True):
        # Cell j pools the places from ⌊j·size/cells⌋ to ⌈(j+1)·size/cells⌉ − 1. In plain numbers, so that a trace knows
        # how many offsets there are. Each on one axis goes with every one on the other: the axes are sorted alone.
        centres = [(j * size // cells + -(-(j + 1) * size // cells) - 1) / 2 for j in range(cells)]
        apart = [[i - c for c in centres] for i in range(size)]
        offsets = sorted({offset for line in apart for offset in line})
        row = {offset: n for n, offset in enumerate(offsets)}
        table = torch.tensor(offsets, dtype=torch.float32, device=device) / max(whole - 1, 1) * 8
        tables.append(table.sign() * (table.abs() + 1).log2() / 3)
        indices.append(torch.tensor([[row[offset] for offset in line] for line in apart], device=device))
    rows, columns = indices  # (H, PH), (W, PW)
    index = rows[:, None, :, None] * len(tables[1]) + columns[None, :, None, :]
    return index.flatten(), torch.cartesian_prod(*tables)


def inside(grid: Grid, window: int, *, device: torch.device | None = None) -> Tensor:
    """Which places of the window around each token lie on the grid: `(N, window²)` bool."""
    on = []
    for size in grid:
        place = torch.arange(size, device=device)[:, None] + torch.arange(window, device=device) - window // 2
        on.append((place >= 0) & (place < size))
    return (on[0][:, None, :, None] & on[1][None, :, None, :]).flatten(2).flatten(0, 1)


@lru_cache(maxsize=32)
def _kept_places(*arguments: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """`relative_places`, made once for all layers of a stage."""
    with torch.inference_mode(False):
        return relative_places(*arguments, device=device)


@register(
    Card(
        name="cosine",
        title="TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
        paper="2311.17132",
        family="spatial",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_GRID,
        cost="N²",
        growth=2.0,
        sample=dict(heads=4, shared=1, routed=1),
    )
)
class CosineAttention(Mechanism):
    """Softmax attention of unit vectors on a grid, at a learned temperature that grows with the number of keys.

        s_ij = (q̂_i + e)·k̂_j · softplus(τ) · ln N + b(i − j)        q̂, k̂ of length one; e learned per head
        b = fc2(relu(fc1(log-scaled offset)))                        a bias that any grid can ask for
        y = Wo concat_h(gate_h · softmax(s) v)                       gates of `HeadRouter`, if heads are routed

    x (B, N, C) with `grid=(H, W)` → (B, N, C), cost O(N²). Sources: arXiv 2311.17132 (TransNeXt, its last stage);
    with gates 2410.11842 (MoH).

    Args:
        trained: the grid at training, to which offsets relate; that of the call if None.
        shared, routed: heads that each token always takes, and how many of the others; no gates if None.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        bias: bool = True,
        shared: int | None = None,
        routed: int | None = None,
        trained: Grid | None = None,
        dropout: float = 0.0,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        if causal:
            raise ValueError(f"{type(self).__name__} has no causal form: places of a grid have no order")
        if (shared is None) != (routed is None):
            raise ValueError(f"shared and routed must be given together, got {shared} and {routed}")
        _, self.head_dim = check_heads(dim, heads)
        self.heads, self.trained, self.dropout = heads, trained, dropout
        self._kept = Kept()
        self.wqkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.wo = nn.Linear(dim, dim)
        # softplus(temperature) = 1 / 0.24 at first
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(math.expm1(1 / 0.24))))
        self.query_embedding = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, 1, self.head_dim), std=0.02))
        self.cpb_fc1, self.cpb_fc2 = nn.Linear(2, 512), nn.Linear(512, heads)
        self.router = None if shared is None or routed is None else HeadRouter(dim, heads, shared, routed)

    def place_bias(self, grid: Grid, places: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """b `(H, N, P)`: what the scores of each query's keys start from; `places` from `relative_places`."""
        index, table = places
        biases = self.cpb_fc2(F.relu(self.cpb_fc1(table.to(dtype))))
        return biases.index_select(0, index).view(math.prod(grid), -1, self.heads).permute(2, 0, 1)

    def bias(self, grid: Grid, x: Tensor) -> Tensor:
        """`place_bias` for tokens like `x`; without gradients it is kept for the next call with the same parameters."""
        if torch.compiler.is_compiling():
            return self.place_bias(grid, relative_places(*self.shapes(grid), device=x.device), x.dtype)
        places = _kept_places(*self.shapes(grid), device=x.device)
        about = (grid, x.dtype)
        return self._kept(about, self.bias_parameters(), lambda: self.place_bias(grid, places, x.dtype))

    def bias_parameters(self) -> tuple[Tensor, ...]:
        return self.cpb_fc1.weight, self.cpb_fc1.bias, self.cpb_fc2.weight, self.cpb_fc2.bias

    def merge(self, heads: Tensor, x: Tensor) -> Tensor:
        """`(B, H, N, D)` through the gates of the tokens `x` and the output projection."""
        if self.router is not None:
            heads = heads * self.router(x).mT.unsqueeze(-1)
        return linear(join_heads(heads), self.wo)

    def sharp(self, q: Tensor, keys: Tensor | float) -> Tensor:
        """Unit queries, at the temperature for so many `keys`."""
        return (q + self.query_embedding) * (F.softplus(self.temperature) * keys)

    def shapes(self, grid: Grid) -> tuple[Grid, Grid, Grid | None]:
        """The arguments of `relative_places`."""
        return grid, self.pooled(grid), self.trained

    def pooled(self, grid: Grid) -> Grid:
        """The grid of the keys that every query sees."""
        return grid

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: Any = None,
        places: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """`places` are those of `relative_places`, where they are kept between calls."""
        self.check(x)
        self.refuse(context=context, pattern=pattern, state=state)
        height, width = check_grid(grid, x.shape[1], 2)
        at = height, width
        bias = self.bias(at, x) if places is None else self.place_bias(at, places, x.dtype)
        return self.merge(self.mix(x, at, bias), x)

    def mix(self, x: Tensor, grid: Grid, bias: Tensor) -> Tensor:
        """Heads `(B, H, N, D)` of tokens `(B, N, C)`, with the `bias` of their scores, (H, N, P)."""
        q, k, v = (split_heads(t, self.heads) for t in linear(x, self.wqkv).chunk(3, -1))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        dropout = self.dropout if self.training else 0.0
        return attend(self.sharp(q, math.log(x.shape[1])), k, v, bias=bias[None], scale=1.0, dropout=dropout)


@register(
    Card(
        name="aggregated",
        title="TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
        paper="2311.17132",
        family="spatial",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_GRID,
        cost="N (window² + N/r²)",
        growth=1.0,
        sample=dict(heads=4, shared=1, routed=1, pool=2),
    )
)
class AggregatedAttention(CosineAttention):
    """As `CosineAttention`, but keys are a window around each token and a pooled map, in one softmax.

        P = norm(pool(gelu(conv1x1(x)))) of (H/r, W/r) cells,  keys = window of x ∪ P, both through the same Wk, Wv
        (w_local, w_pool) = softmax(s)        for ln(number of keys in sight) as the temperature's factor
        head = (w_local + q̂ T + t) v_window + w_pool v_P                       T, t learned per place in the window

    x (B, N, C) with `grid=(H, W)` → (B, N, C), cost O(N (window² + N/r²)). Sources: arXiv 2311.17132 (TransNeXt, its
    first stages); with gates 2410.11842 (MoH).

    Args:
        window: odd side of the window.
        ratio: r; `pool` gives the side of the pooled map instead. A small grid has a map of at most its own size, and
            of one cell at least.
        Others as for `CosineAttention`.
    """

    def __init__(
        self, dim: int, *, heads: int = 8, window: int = 3, ratio: int = 1, pool: int | None = None, **keywords: Any
    ) -> None:
        super().__init__(dim, heads=heads, **keywords)
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window must be odd and at least 1, got {window}")
        if ratio < 1 or (pool is not None and pool < 1):
            raise ValueError(f"ratio and pool must be at least 1, got {ratio} and {pool}")
        self.window, self.ratio, self.pool = window, ratio, pool
        self.reduce, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        places = window**2
        self.window_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, places), std=0.0004))
        self.window_tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, self.head_dim, places), std=0.02))
        self.window_shift = nn.Parameter(torch.zeros(heads, 1, places))

    def pooled(self, grid: Grid) -> Grid:
        sides = (min(self.pool, g) if self.pool is not None else max(g // self.ratio, 1) for g in grid)
        height, width = sides
        return height, width

    def place_bias(self, grid: Grid, places: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """b `(H, N, window² + P)`: −∞ where a window hangs over the edge."""
        outside = ~inside(grid, self.window, device=places[0].device)
        near = self.window_bias.unsqueeze(1).expand(-1, len(outside), -1).masked_fill(outside, -math.inf)
        return torch.cat((near, super().place_bias(grid, places, dtype)), -1)

    def bias_parameters(self) -> tuple[Tensor, ...]:
        return *super().bias_parameters(), self.window_bias

    def mix(self, x: Tensor, grid: Grid, bias: Tensor) -> Tensor:
        cells, dim = self.pooled(grid), self.dim
        q, k, v = linear(x, self.wqkv).split(dim, -1)
        q = F.normalize(split_heads(q, self.heads), dim=-1)
        k = F.normalize(split_heads(k, self.heads), dim=-1)
        v = split_heads(v, self.heads)

        pool = F.adaptive_avg_pool2d(F.gelu(self.reduce(x)).mT.unflatten(2, grid), cells)
        kv_bias = None if self.wqkv.bias is None else self.wqkv.bias[dim:]
        kv = F.linear(self.norm(pool.flatten(2).mT), self.wqkv.weight[dim:], kv_bias)
        far_k, far_v = (split_heads(t, self.heads) for t in kv.split(dim, -1))

        keys = inside(grid, self.window, device=x.device).sum(-1, keepdim=True) + math.prod(cells)
        sharp = self.sharp(q, keys.to(x.dtype).log())
        near = window_scores(sharp.unflatten(2, grid), k.unflatten(2, grid), self.window).flatten(2, 3)
        scores = torch.cat((near, sharp @ F.normalize(far_k, dim=-1).mT), -1).add_(bias)
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        near, far = weights.split([self.window**2, far_k.shape[2]], -1)
        near = near + (q @ self.window_tokens).add_(self.window_shift)
        return window_sum(near.unflatten(2, grid), v.unflatten(2, grid), self.window).flatten(2, 3) + far @ far_v
