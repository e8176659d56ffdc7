"""What attention looks at, as numbers per query and per key, without its matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnlab.attend import pose
from attnlab.backends.tiles.plain import Tile, score, steps
from attnlab.backends.tiles.plan import tiling
from attnlab.problem import Problem


@dataclass(frozen=True, eq=False)
class Statistics:
    """Softmax weights w_ij of queries i and keys j, summed up. A query that sees no key has 0 everywhere, lse −inf.

    entropy, max, distance, lse: `(B, H, Nq)`; received: `(B, H, Nk)`; out: `(B, H, Nq, Dv)`, or None without values.
    """

    entropy: Tensor  # −Σ_j w_ij ln w_ij: from 0 (one key) to ln n (n keys alike)
    received: Tensor  # Σ_i w_ij: over keys it sums to the number of queries
    max: Tensor  # max_j w_ij
    distance: Tensor  # Σ_j w_ij |place(i) − place(j)|
    lse: Tensor
    out: Tensor | None

    def sink(self, count: int = 1) -> Tensor:
        """The share of all attention that the first `count` keys receive, `(B, H)`."""
        return self.received[..., :count].sum(-1) / self.received.sum(-1).clamp_min(1e-30)


@torch.no_grad()
def statistics(
    q: Tensor, k: Tensor, v: Tensor | None = None, *, grid: tuple[int, ...] | None = None, offset: int = 0, **where: Any
) -> Statistics:
    """Entropy, received attention, largest weight and mean distance of softmax attention, in O(N) memory.

    A tile of queries at a time: its weights are made, summed up and dropped. Time as a forward pass; no gradient.

    Args:
        q, k, v: heads, as for `attend`; with `v`, the output comes too.
        grid: tokens lie on this grid, row-major, and distance is Euclidean on it; else it is that of positions.
        offset: the position of the first query.
        where: `pattern`, `route`, `bias` and `scale`, as for `attend`.
    """
    unknown = sorted(set(where) - {"pattern", "route", "bias", "scale"})
    if unknown:
        raise TypeError(f"statistics takes pattern, route, bias and scale, got {', '.join(unknown)}")
    problem = pose(q, k, k if v is None else v, **where)
    wide = torch.promote_types(q.dtype, torch.float32)
    per_query, per_key = ((problem.batch, problem.heads, n) for n in (problem.nq, problem.nk))
    found = Statistics(
        entropy=torch.zeros(per_query, dtype=wide, device=q.device),
        received=torch.zeros(per_key, dtype=wide, device=q.device),
        max=torch.zeros(per_query, dtype=wide, device=q.device),
        distance=torch.zeros(per_query, dtype=wide, device=q.device),
        lse=torch.full(per_query, -torch.inf, dtype=wide, device=q.device),
        out=None if v is None else torch.zeros(*per_query, problem.value_dim, dtype=wide, device=q.device),
    )
    places = [_places(n, grid, start, q.device).to(wide) for n, start in ((problem.nq, offset), (problem.nk, 0))]
    for part, b, h, kv in problem.parts():
        values = (k if v is None else v)[b, kv]
        for group, tiles in steps(part, tiling(part.pattern, part.nq, part.nk, part.device)):
            _add(found, part, score(part, q[b, h], k[b, kv], values, group, tiles), b, h, *places)
    return found if found.out is None else replace(found, out=found.out.to(q.dtype))


def _add(found: Statistics, p: Problem, tile: Tile, b: slice, h: slice, q_place: Tensor, k_place: Tensor) -> None:
    """Put the numbers of one step of tiles in their places."""
    scores = tile.scores.masked_fill(~tile.seen, -torch.inf)
    dead = (scores == -torch.inf).all(-1)
    lse = scores.masked_fill(dead[..., None], 0.0).logsumexp(-1)
    weights = (scores - lse[..., None]).exp().masked_fill(dead[..., None], 0.0)
    # Within a tiling that all batch entries and heads share, the lists have size one there.
    queries, keys = tile.queries[0, 0, 0], tile.keys[0, 0, 0]
    apart = (q_place[queries][:, :, None] - k_place[keys][:, None]).square().sum(-1).sqrt()
    # 0 · −∞ is 0 here: a weight that is nothing says nothing.
    surprise = torch.where(weights > 0, weights * (lse[..., None] - scores), 0.0)
    here = {
        "entropy": surprise.sum(-1),
        "max": weights.amax(-1),
        "distance": (weights * apart).sum(-1),
        "lse": lse.masked_fill(dead, -torch.inf),
    }
    at = queries.flatten()
    for name, value in here.items():
        getattr(found, name)[b, h, at] = value.flatten(1, 2).flatten(2)
    received = weights.sum(-2).flatten(1, 2).flatten(2)
    found.received[b, h] = found.received[b, h].index_add(2, keys.flatten(), received)
    if found.out is not None:
        found.out[b, h, at] = (weights @ tile.values).flatten(1, 2).flatten(2, 3)


def _places(count: int, grid: tuple[int, ...] | None, offset: int, device: torch.device) -> Tensor:
    """Coordinates `(N, axes)` of tokens, the first of them at `offset`."""
    at = torch.arange(offset, offset + count, device=device)
    if grid is None:
        return at[:, None]
    if offset + count > math.prod(grid):
        raise ValueError(f"grid {grid} holds {math.prod(grid)} tokens, got {offset + count}")
    return torch.stack(torch.unravel_index(at, grid), -1)
