"""What attention looks at, as numbers per query and per key, without its matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnlab.attend import pose
from attnlab.backends.stripes import stripes
from attnlab.backends.tiles.plain import Tile, score, steps
from attnlab.backends.tiles.plan import TILE, tiling
from attnlab.problem import Bias, Problem

# Keys per tile above which a plan that lists them would be larger than what it saves.
_LISTED = 4096


@dataclass(frozen=True, eq=False)
class Statistics:
    """Softmax weights w_ij of queries i and keys j, summed up. A query that sees no key has 0 everywhere, lse −inf.

    entropy, max, distance, sink_mass, lse: `(B, H, Nq)`; received: `(B, H, Nk)`; out: `(B, H, Nq, Dv)`, or None
    without values.
    """

    entropy: Tensor  # −Σ_j w_ij ln w_ij: from 0 (one key) to ln n (n keys alike)
    received: Tensor  # Σ_i w_ij: over keys it sums to the number of queries
    max: Tensor  # max_j w_ij
    distance: Tensor  # Σ_j w_ij |place(i) − place(j)|
    sink_mass: Tensor  # Σ_{j < sinks} w_ij
    lse: Tensor
    out: Tensor | None

    def sink(self, count: int = 1) -> Tensor:
        """The share of all attention that the first `count` keys receive, `(B, H)`."""
        return self.received[..., :count].sum(-1) / self.received.sum(-1).clamp_min(1e-30)


@torch.no_grad()
def statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    grid: tuple[int, ...] | None = None,
    prefix: int | None = None,
    offset: int = 0,
    sinks: int = 1,
    **where: Any,
) -> Statistics:
    """Entropy, received attention, sinks, largest weight and mean distance of softmax attention, in O(N) memory.

    A tile of queries at a time: its weights are made, summed up and dropped. Time of the order of a forward pass; no
    gradient. A pattern that names few keys per tile costs those alone; any other is read in stripes of all keys.

    Args:
        q, k, v: heads, as for `attend`; with `v`, the output comes too.
        mask: beside the pattern: bool (True: may look) or a number added to the scores, broadcastable to
            `(B, H, Nq, Nk)`.
        grid: tokens lie on this grid, row-major, and distance is Euclidean on it; else it is that of positions.
        prefix: tokens before the grid, such as a class token. They, and any after the grid, have no place on it: the
            mean distance is over the keys that have one, and 0 for a query that has none.
        offset: the position of the first query.
        sinks: how many of the first keys count as sinks.
        where: `pattern`, `route`, `bias` and `scale`, as for `attend`.
    """
    unknown = sorted(set(where) - {"pattern", "route", "bias", "scale"})
    if unknown:
        raise TypeError(f"statistics takes mask, pattern, route, bias and scale, got {', '.join(unknown)}")
    problem = pose(q, k, k if v is None else v, **where)
    if mask is not None:
        mask = _as_mask(mask, problem)
    wide = torch.promote_types(q.dtype, torch.float32)
    per_query, per_key = ((problem.batch, problem.heads, n) for n in (problem.nq, problem.nk))
    zeros = {name: torch.zeros(per_query, dtype=wide, device=q.device) for name in ("entropy", "max", "distance")}
    found = Statistics(
        **zeros,
        sink_mass=torch.zeros(per_query, dtype=wide, device=q.device),
        received=torch.zeros(per_key, dtype=wide, device=q.device),
        lse=torch.full(per_query, -torch.inf, dtype=wide, device=q.device),
        out=None if v is None else torch.zeros(*per_query, problem.value_dim, dtype=wide, device=q.device),
    )
    places = _Places(problem, grid, prefix, offset)
    for part, b, h, kv in problem.parts():
        own = mask
        if mask is not None:
            own = mask[b if len(mask) > 1 else slice(None), h if mask.shape[1] > 1 else slice(None)]
        mine, keys, value = q[b, h], k[b, kv], None if v is None else v[b, kv]
        if _few_keys(part):
            part = part if own is None else replace(part, bias=_Both(part.bias, own))
            for group, tiles in steps(part, tiling(part.pattern, part.nq, part.nk, part.device)):
                tile = score(part, mine, keys, keys if value is None else value, group, tiles)
                _add_tile(found, tile, b, h, places, sinks)
        else:
            _add_stripes(found, part, mine, keys, value, own, b, h, places, sinks)
    return found if found.out is None else replace(found, out=found.out.to(q.dtype))


def _few_keys(p: Problem) -> bool:
    """Whether the pattern names so few keys for a tile of queries that a plan of all tiles is small."""
    tiles = p.pattern.query_tiles(p.nq)
    if tiles is None:
        tiles = torch.arange(p.nq - p.nq % TILE).view(-1, TILE) if p.nq >= TILE else torch.arange(p.nq)[None]
    some = tiles[:: max(1, len(tiles) // 8)]
    # Padding would look like a query at −1; its tile's first query stands in.
    keys = p.pattern.tile_keys(torch.where(some >= 0, some, some[:, :1]), p.nk)
    return keys is not None and keys.shape[1] <= min(_LISTED, p.nk // 2)


@dataclass(frozen=True, eq=False)
class _Both:
    """A bias and a mask as one bias."""

    bias: Bias | None
    mask: Tensor

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        found = _at(self.mask, b, h, q, k)
        if not found.is_floating_point():
            found = torch.zeros(found.shape, device=found.device).masked_fill(~found, -torch.inf)
        if self.bias is None:
            return found
        return found + (_at(self.bias, b, h, q, k) if isinstance(self.bias, Tensor) else self.bias(b, h, q, k))


def _at(x: Tensor, *indices: Tensor) -> Tensor:
    x = x.reshape((1,) * (4 - x.dim()) + x.shape)
    return x[tuple(i if n > 1 else torch.zeros_like(i) for n, i in zip(x.shape, indices, strict=True))]


def _as_mask(mask: Tensor, p: Problem) -> Tensor:
    """`mask` with four axes, the last of full length, or why not."""
    wanted = (p.batch, p.heads, p.nq, p.nk)
    fits = mask.dim() <= 4 and all(n in (1, w) for n, w in zip(mask.shape[::-1], wanted[::-1], strict=False))
    if not fits:
        raise ValueError(f"mask must be broadcastable to (B, H, Nq, Nk) = {wanted}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be bool (True: may look) or floating point (added), got {mask.dtype}")
    if mask.device != p.device:
        raise ValueError(f"mask must be on q's device {p.device}, got {mask.device}")
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    return mask.expand(-1, -1, -1, p.nk)


class _Places:
    """Where queries and keys stand: how far apart they are, and how far a query looks on average."""

    def __init__(self, p: Problem, grid: tuple[int, ...] | None, prefix: int | None, offset: int) -> None:
        wide = torch.promote_types(p.dtype, torch.float32)
        self.q, self.q_placed = _places(p.nq, grid, prefix, offset, wide, p.device)
        self.k, self.k_placed = _places(p.nk, grid, prefix, 0, wide, p.device)
        self.everywhere = bool((self.q_placed == 1).all() and (self.k_placed == 1).all())
        self.line = grid is None
        self._of: tuple[slice, slice] | None = None
        self._apart = torch.empty(0)

    def mean(
        self, weights: Tensor, queries: Tensor | slice, keys: Tensor | slice, total: Tensor, spare: Tensor | None = None
    ) -> Tensor:
        """Σ_j w_ij |i − j| over Σ_j w_ij of the keys with a place; `total` is that of all keys."""
        if self.line and isinstance(queries, slice) and isinstance(keys, slice):
            return self._along(weights, queries, keys) / total.masked_fill(total == 0, 1.0)
        far = torch.mul(weights, self.apart(queries, keys), out=spare).sum(-1)
        if not self.everywhere:
            total = (weights * self.k_placed[keys][..., None, :]).sum(-1)
        return far / total.masked_fill(total == 0, 1.0)

    def apart(self, queries: Tensor | slice, keys: Tensor | slice) -> Tensor:
        """Distances `(…, q, k)` of tokens `(…, q)` and `(…, k)`, 0 where one has no place."""
        if isinstance(queries, slice) and isinstance(keys, slice):
            if self._of == (queries, keys):  # as for the heads before
                return self._apart
            self._of = (queries, keys)
        difference = self.q[queries][..., :, None, :] - self.k[keys][..., None, :, :]
        far = difference[..., 0].abs() if difference.shape[-1] == 1 else difference.square().sum(-1).sqrt()
        if not self.everywhere:
            far = far * self.q_placed[queries][..., None] * self.k_placed[keys][..., None, :]
        self._apart = far
        return far

    def _along(self, weights: Tensor, queries: slice, keys: slice) -> Tensor:
        """Σ_j w_ij |i − j| on a line: of keys before and behind all the queries by products, without a distance each.

        All terms are positive, so that nothing cancels.
        """
        q, k = self.q[queries, 0], self.k[keys, 0]
        left, right = (int(n) for n in torch.searchsorted(k, q[[0, -1]]).tolist())
        before, within, behind = weights[..., :left], weights[..., left:right], weights[..., right:]
        far = (within * (q[:, None] - k[left:right]).abs()).sum(-1)
        far += before.sum(-1) * (q - q[0]) + before @ (q[0] - k[:left])
        return far + behind.sum(-1) * (q[-1] - q) + behind @ (k[right:] - q[-1])


def _places(
    count: int, grid: tuple[int, ...] | None, prefix: int | None, offset: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Coordinates `(N, axes)` of tokens, the first of them at `offset`, and 1 or 0 for whether they have any."""
    at = torch.arange(offset, offset + count, device=device)
    if grid is None:
        return at[:, None].to(dtype), torch.ones(count, dtype=dtype, device=device)
    size = math.prod(grid)
    if prefix is None and offset + count > size:
        raise ValueError(f"grid {grid} holds {size} tokens, got {offset + count} (prefix says how many come before it)")
    at = at - (prefix or 0)
    placed = (at >= 0) & (at < size)
    return torch.stack(torch.unravel_index(at.clamp(0, size - 1), grid), -1).to(dtype), placed.to(dtype)


def _add_tile(found: Statistics, tile: Tile, b: slice, h: slice, places: _Places, sinks: int) -> None:
    """Put the numbers of one step of tiles in their places."""
    scores = tile.scores.masked_fill(~tile.seen, -torch.inf)
    dead = (scores == -torch.inf).all(-1)
    lse = scores.masked_fill(dead[..., None], 0.0).logsumexp(-1)
    weights = (scores - lse[..., None]).exp().masked_fill(dead[..., None], 0.0)
    # Within a tiling that all batch entries and heads share, the lists have size one there.
    queries, keys = tile.queries[0, 0, 0], tile.keys[0, 0, 0]
    # 0 · −∞ is 0 here: a weight that is nothing says nothing.
    surprise = torch.where(weights > 0, weights * (lse[..., None] - scores), 0.0)
    here = {
        "entropy": surprise.sum(-1),
        "max": weights.amax(-1),
        "distance": places.mean(weights, queries, keys, weights.sum(-1)),
        "sink_mass": (weights * (keys < sinks)[:, None]).sum(-1),
        "lse": lse.masked_fill(dead, -torch.inf),
    }
    at = queries.flatten()
    for name, value in here.items():
        getattr(found, name)[b, h, at] = value.flatten(1, 2).flatten(2)
    received = weights.sum(-2).flatten(1, 2).flatten(2)
    found.received[b, h] = found.received[b, h].index_add(2, keys.flatten(), received)
    if found.out is not None:
        found.out[b, h, at] = (weights @ tile.values).flatten(1, 2).flatten(2, 3)


def _add_stripes(
    found: Statistics, p: Problem, q: Tensor, k: Tensor, v: Tensor | None, mask: Tensor | None, b: slice, h: slice,
    places: _Places, sinks: int,
) -> None:  # fmt: skip
    """Put the numbers of a part of the problem, read in stripes, in their places."""
    for s in stripes(p, q, k, mask):
        here = (b.start + s.b, slice(h.start + s.heads.start, h.start + s.heads.stop))
        rows, columns = (*here, s.queries), (*here, s.keys)
        # All in place, or in products that read the scores once: what this costs is passes over the scores.
        top = s.scores.amax(-1, keepdim=True)
        top.masked_fill_(top == s.hidden, 0.0)
        below = s.scores.sub_(top)
        if s.hidden == -torch.inf:
            below.clamp_min_(torch.finfo(below.dtype).min)  # 0 · −∞ is 0 here
        terms = torch.exp(below, out=s.spare)
        total, first = terms.sum(-1), terms[..., : max(sinks - s.keys.start, 0)].sum(-1)
        share, log = torch.where(total > 0, 1 / total, 0.0), total.log()
        found.lse[rows] = log + top[..., 0]
        found.max[rows] = share
        found.sink_mass[rows] = first * share
        found.received[columns] += (share[:, None] @ terms)[:, 0]
        found.entropy[rows] = (log - below.mul_(terms).sum(-1) * share).masked_fill(total == 0, 0.0)
        found.distance[rows] = places.mean(terms, s.queries, s.keys, total, spare=below)
        if v is not None and found.out is not None:
            heads = terms.view(s.kv_heads.stop - s.kv_heads.start, -1, terms.shape[-1])
            value = heads @ v[s.b, s.kv_heads, s.keys].to(heads.dtype)
            found.out[rows] = value.view(*terms.shape[:2], -1) * share[..., None]
