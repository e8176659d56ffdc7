"""Attention of a window around each token and of a pooled map together, with cosine scores (TransNeXt)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import ANY_GRID, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.mechanism import Mechanism, check_grid, check_heads, join_heads, split_heads
from attnlab.nn.softmax.mixture_of_heads import HeadRouter
from attnlab.patterns import Pattern


def relative_places(
    grid: tuple[int, int],
    keys: tuple[int, int],
    trained: tuple[int, int] | None = None,
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
        trained: tuple[int, int] | None = None,
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
        self._places: dict[tuple[tuple[int, int], torch.device], tuple[Tensor, Tensor]] = {}
        self.wqkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.wo = nn.Linear(dim, dim)
        # softplus(temperature) = 1 / 0.24 at first
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(math.expm1(1 / 0.24))))
        self.query_embedding = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, 1, self.head_dim), std=0.02))
        self.cpb_fc1, self.cpb_fc2 = nn.Linear(2, 512), nn.Linear(512, heads)
        self.router = None if shared is None or routed is None else HeadRouter(dim, heads, shared, routed)

    def place_bias(self, index: Tensor, table: Tensor, queries: int) -> Tensor:
        """b `(H, N, P)` from `relative_places`."""
        return self.cpb_fc2(F.relu(self.cpb_fc1(table))).T[:, index].unflatten(1, (queries, -1))

    def merge(self, heads: Tensor, x: Tensor) -> Tensor:
        """`(B, H, N, D)` through the gates of the tokens `x` and the output projection."""
        if self.router is not None:
            heads = heads * self.router(x).mT.unsqueeze(-1)
        return self.wo(join_heads(heads))

    def sharp(self, q: Tensor, keys: Tensor | float) -> Tensor:
        """Unit queries, at the temperature for so many `keys`."""
        return (q + self.query_embedding) * (F.softplus(self.temperature) * keys)

    def places(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """`relative_places` of a grid, kept for its next call."""
        if torch.compiler.is_compiling():
            return relative_places(grid, self.pooled(grid), self.trained, device=device)
        if (grid, device) not in self._places:
            with torch.inference_mode(False):
                made = relative_places(grid, self.pooled(grid), self.trained, device=device)
            self._places = {(grid, device): made}
        return self._places[grid, device]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_places": {}}

    def pooled(self, grid: tuple[int, int]) -> tuple[int, int]:
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
        if places is None:
            places = self.places((height, width), x.device)
        bias = self.place_bias(places[0], places[1].to(x.dtype), x.shape[1])
        return self.merge(self.mix(x, (height, width), bias), x)

    def mix(self, x: Tensor, grid: tuple[int, int], bias: Tensor) -> Tensor:
        """Heads `(B, H, N, D)` of tokens `(B, N, C)`, with `bias (H, N, P)`."""
        q, k, v = (split_heads(t, self.heads) for t in self.wqkv(x).chunk(3, -1))
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

    def pooled(self, grid: tuple[int, int]) -> tuple[int, int]:
        sides = (min(self.pool, g) if self.pool is not None else max(g // self.ratio, 1) for g in grid)
        height, width = sides
        return height, width

    def unfold(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """`(B, N, C)` to the windows `(B, N, C, places)`, zeros outside the grid."""
        maps = x.mT.unflatten(2, grid)
        return F.unfold(maps, self.window, padding=self.window // 2).unflatten(1, (x.shape[2], -1)).permute(0, 3, 1, 2)

    def mix(self, x: Tensor, grid: tuple[int, int], bias: Tensor) -> Tensor:
        cells, heads = self.pooled(grid), (self.heads, self.head_dim)
        q, k, v = self.wqkv(x).chunk(3, -1)
        q = F.normalize(split_heads(q, self.heads), dim=-1)
        k = F.normalize(k.unflatten(-1, heads), dim=-1).flatten(-2)
        # Windows of keys and of values, (B, H, N, D, places).
        near_k, near_v = (self.unfold(t, grid).unflatten(2, heads).transpose(1, 2) for t in (k, v))
        inside = self.unfold(x.new_ones(1, x.shape[1], 1), grid)[0, :, 0] > 0  # (N, places)

        pool = F.adaptive_avg_pool2d(F.gelu(self.reduce(x)).mT.unflatten(2, grid), cells)
        cut, kv_bias = self.dim, self.wqkv.bias
        kv = F.linear(self.norm(pool.flatten(2).mT), self.wqkv.weight[cut:], None if kv_bias is None else kv_bias[cut:])
        far_k, far_v = (split_heads(t, self.heads) for t in kv.chunk(2, -1))

        sharp = self.sharp(q, (inside.sum(-1, keepdim=True) + math.prod(cells)).to(x.dtype).log())
        near = (sharp.unsqueeze(-2) @ near_k).squeeze(-2) + self.window_bias.unsqueeze(1)
        scores = torch.cat((near.masked_fill(~inside, -math.inf), sharp @ F.normalize(far_k, dim=-1).mT + bias), -1)
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        near, far = weights.split([self.window**2, far_k.shape[2]], -1)
        near = near + q @ self.window_tokens + self.window_shift
        return (near_v @ near.unsqueeze(-1)).squeeze(-1) + far @ far_v
