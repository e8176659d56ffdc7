"""How much faster a pattern can be than full attention: what a kernel that works on tiles has to visit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.patterns.base import Pattern
from attnlab.patterns.grid import GridPattern, per_axis

Tile = int | tuple[int, ...]
# Pairs asked of `allows` at a time.
_ASKED = 2**22


@dataclass(frozen=True)
class Speedup:
    """What `speedup` found; `str` is one line.

    `ideal` counts pairs (nothing can be faster), `reachable` counts visited tiles, both against full attention.
    `wasted` is the share of the visited pairs that the pattern masks. In a `perfect` case no visited tile needs a mask.
    """

    ideal: float
    reachable: float
    wasted: float
    perfect: bool
    visited: int
    possible: int

    def __str__(self) -> str:
        how = "no mask needed" if self.perfect else f"{self.wasted:.0%} of it masked"
        return (
            f"{self.reachable:.4g}× of at most {self.ideal:.4g}×: visits {self.visited} of {self.possible} tiles, {how}"
        )


@dataclass(frozen=True, eq=False)
class Visits:
    """For each tile of queries, how many tiles of keys are seen in `full` and in `partial`."""

    full: Tensor
    partial: Tensor
    key_tiles: int

    @property
    def total(self) -> int:
        return int(self.full.sum() + self.partial.sum())


def speedup(
    pattern: Pattern,
    q_tile: Tile,
    kv_tile: Tile | None = None,
    *,
    nq: int | None = None,
    nk: int | None = None,
    dynamic: bool = False,
) -> Speedup:
    """How much faster than full attention `pattern` can be, in pairs and on a kernel with tiles of this shape.

    The simulator of Generalized Neighborhood Attention (arXiv 2504.16922) for any pattern: a tile of queries visits
    every tile of keys of which some query sees something. A bound for kernels that are limited by arithmetic.

    Args:
        q_tile, kv_tile: queries and keys per tile; as many keys as queries if None. A tuple, one number for each axis
            of the pattern's grid, is tiles that are boxes of the grid (multi-dimensional tiling: the tokens are
            reordered, and each residue of a dilation by itself); a number is runs of the tokens as they lie.
        nq, nk: the lengths, for a pattern without a grid.
        dynamic: the first key tile begins at the first key seen, not at a multiple of the tile.

    >>> speedup(Neighborhood(grid=(256, 256), kernel=80, stride=16), (16, 16), (16, 8)).reachable
    10.24
    """
    nq, nk = _lengths(pattern, nq, nk)
    kv_tile = q_tile if kv_tile is None else kv_tile
    found = visits(pattern, q_tile, kv_tile, nq=nq, nk=nk, dynamic=dynamic)
    pairs = _pairs(pattern, nq, nk)
    computed = found.total * math.prod(_tuple(q_tile)) * math.prod(_tuple(kv_tile))
    possible = len(found.full) * found.key_tiles
    return Speedup(
        ideal=nq * nk / pairs if pairs else math.inf,
        reachable=possible / found.total if found.total else math.inf,
        wasted=max(0.0, 1.0 - pairs / computed) if computed else 0.0,
        perfect=not bool(found.partial.any()),
        visited=found.total,
        possible=possible,
    )


def visits(
    pattern: Pattern,
    q_tile: Tile,
    kv_tile: Tile,
    *,
    nq: int | None = None,
    nk: int | None = None,
    dynamic: bool = False,
) -> Visits:
    """The tiles of keys that each tile of queries visits, tiles in row-major order (see `speedup`).

    A tile that reaches past the end counts as if its last query stood there again.
    """
    nq, nk = _lengths(pattern, nq, nk)
    for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)):
        if min(_tuple(tile)) < 1:
            raise ValueError(f"{name} must be positive, got {tile}")
    line = isinstance(pattern, GridPattern) and len(pattern.grid) == 1 and pattern.step(0) == 1 and nq == nk
    if isinstance(q_tile, int) and isinstance(kv_tile, int) and not line:
        return _runs(pattern, q_tile, kv_tile, nq, nk, dynamic)
    if not isinstance(pattern, GridPattern):
        raise ValueError(f"q_tile and kv_tile must be integers for a pattern without a grid, got {q_tile}, {kv_tile}")
    if nq != nk:
        raise ValueError(f"nq must be the whole grid's {nk} for tiles that are boxes, got {nq}")
    axes = len(pattern.grid)
    q_tiles, kv_tiles = per_axis("q_tile", q_tile, axes), per_axis("kv_tile", kv_tile, axes)
    full, total, key_tiles = torch.ones(1, dtype=torch.long), torch.ones(1, dtype=torch.long), 1
    for axis in range(axes):
        # Windows are boxes, so counts multiply over the axes.
        one_full, one_total, one_keys = _axis(pattern, axis, q_tiles[axis], kv_tiles[axis], dynamic)
        full, total = (torch.outer(x, y).flatten() for x, y in ((full, one_full), (total, one_total)))
        key_tiles *= one_keys
    return Visits(full, total - full, key_tiles)


def end_to_end(share: float, faster: float, steps: float = 1.0) -> float:
    """Amdahl: how much faster the whole gets if attention, `share` of the time, gets `faster` in a part of the `steps`.

    Diffusion models often keep full attention in the first quarter of the steps: `steps=0.75`.
    """
    if not 0 <= share <= 1 or not 0 <= steps <= 1 or faster <= 0:
        raise ValueError(f"share and steps must lie in [0, 1] and faster be positive, got {share}, {steps}, {faster}")
    return 1.0 / (1.0 - share * steps * (1.0 - 1.0 / faster))


def _axis(pattern: GridPattern, axis: int, q_tile: int, kv_tile: int, dynamic: bool) -> tuple[Tensor, Tensor, int]:
    """Of one axis: key tiles seen in full and key tiles seen at all by each query tile, and how many there are."""
    length, step = pattern.grid[axis], pattern.step(axis)
    fulls, totals, key_tiles = [], [], 0
    for residue in range(min(step, length)):
        # Tokens of other residues never meet: a grid of its own.
        at = torch.arange(residue, length, step)
        first, last = ((x - residue) // step for x in pattern.interval(axis, at))
        count = -(-len(at) // q_tile)
        rows = torch.arange(count * q_tile).clamp_max(len(at) - 1).view(count, q_tile)
        first, last = first[rows], last[rows]
        low, high = first.amin(1), last.amax(1)
        begin = low if dynamic else low // kv_tile * kv_tile
        total = (high - begin) // kv_tile + 1
        # Tiles inside the interval that every query of the tile accepts.
        inner_low = begin + -((begin - first.amax(1)) // kv_tile) * kv_tile
        full = ((last.amin(1) + 1 - inner_low) // kv_tile).clamp_min(0)
        fulls.append(full)
        totals.append(total)
        key_tiles += -(-len(at) // kv_tile)
    return torch.cat(fulls), torch.cat(totals), key_tiles


def _runs(pattern: Pattern, q_tile: int, kv_tile: int, nq: int, nk: int, dynamic: bool, sample: int = 0) -> Visits:
    """Tiles that are runs of tokens as they lie, for any pattern."""
    pairs = tile_pairs(pattern.at(0, 0), q_tile, kv_tile, nq, nk, dynamic=dynamic, sample=sample)
    full = (pairs == q_tile * kv_tile).sum(1)
    return Visits(full, (pairs > 0).sum(1) - full, pairs.shape[1])


def tile_pairs(
    pattern: Pattern, q_tile: int, kv_tile: int, nq: int, nk: int, *, dynamic: bool = False, sample: int = 0
) -> Tensor:
    """How many pairs of each query tile and key tile, runs of tokens as they lie, the pattern allows: `(Tq, Tk)`.

    The last query repeats to fill its tile. `sample` looks at only so many query tiles, spread evenly. Memory
    Tq·Tk and a few MiB; time linear in the pairs that the pattern's `tile_keys` names, or Nq·Nk.
    """
    zero = torch.zeros((), dtype=torch.long)
    count, key_tiles = -(-nq // q_tile), -(-nk // kv_tile)
    chosen = torch.arange(count)
    if 0 < sample < count:
        chosen = torch.linspace(0, count - 1, sample).round().long()
    queries = (chosen[:, None] * q_tile + torch.arange(q_tile)).clamp_max(nq - 1)
    listed = pattern.tile_keys(queries, nk)
    if listed is None:
        listed = torch.arange(nk).expand(len(queries), nk)
    found = []
    piece = max(1, _ASKED // (q_tile * max(1, listed.shape[1])))
    for some, keys in zip(queries.split(piece), listed.split(piece), strict=True):
        seen = pattern.allows(zero, zero, some[:, :, None], keys.clamp_min(0)[:, None])
        seen = seen.expand(*some.shape, keys.shape[1]) & (keys >= 0)[:, None]
        pairs = seen.sum(1)
        if dynamic:
            keys = keys - torch.where(pairs > 0, keys, nk).amin(1, keepdim=True)
        tile = torch.where(pairs > 0, keys // kv_tile, key_tiles)
        sums = torch.zeros(len(some), key_tiles + 1, dtype=torch.long)
        found.append(sums.scatter_add_(1, tile, pairs)[:, :key_tiles])
    return torch.cat(found)


def visited_share(pattern: Pattern, nq: int, nk: int, tile: int = 128) -> float:
    """Estimate, from a sample of the queries, of the share of all tiles that a kernel with square tiles visits."""
    found = _runs(pattern, tile, tile, nq, nk, dynamic=False, sample=24)
    return found.total / (len(found.full) * found.key_tiles)


def _pairs(pattern: Pattern, nq: int, nk: int) -> float:
    if isinstance(pattern, GridPattern) and nq == nk:
        pairs = 1
        for axis, length in enumerate(pattern.grid):
            first, last = pattern.interval(axis, torch.arange(length))
            pairs *= int(((last - first) // pattern.step(axis) + 1).sum())
        return pairs
    return pattern.at(0, 0).density(nq, nk) * nq * nk


def _lengths(pattern: Pattern, nq: int | None, nk: int | None) -> tuple[int, int]:
    if nq is None:
        if not isinstance(pattern, GridPattern):
            raise ValueError(f"nq must be given for a pattern without a grid, got {pattern}")
        nq = math.prod(pattern.grid)
    nk = nq if nk is None else nk
    pattern.check(nq, nk)
    return nq, nk


def _tuple(tile: Tile | Sequence[int]) -> tuple[int, ...]:
    return (tile,) if isinstance(tile, int) else tuple(tile)
