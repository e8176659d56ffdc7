"""A tiling: which queries are computed together, and which keys each such tile looks among."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

# One step of the kernel gathers about this much; more would fall out of the cache, less would be all overhead.
STEP_BYTES = 6 * 2**20


@dataclass(frozen=True, eq=False)
class Lists:
    """The token numbers of each tile: `index (B or 1, Hkv or 1, T, n)`, in units of `unit` adjacent tokens.

    Where the tiles lie evenly in the sequence (tile t holds start + t·step + 0…n−1) `run` says so, and the kernel
    looks at the tokens in place instead of copying them.
    """

    index: Tensor
    unit: int = 1

    @property
    def tiles(self) -> int:
        return self.index.shape[2]

    @property
    def length(self) -> int:
        """Tokens per tile."""
        return self.index.shape[3] * self.unit

    @cached_property
    def run(self) -> tuple[int, int] | None:
        """(start, step) if the lists are such runs."""
        if self.index.shape[:2] != (1, 1) or self.unit != 1:
            return None
        index = self.index[0, 0]
        start = int(index[0, 0])
        step = int(index[1, 0]) - start if len(index) > 1 else index.shape[1]
        even = start + step * torch.arange(len(index), device=index.device)[:, None]
        even = even + torch.arange(index.shape[1], device=index.device)
        return (start, step) if step >= 0 and torch.equal(index, even) else None

    def tokens(self, batch: slice, tiles: slice) -> Tensor:
        """Token numbers `(B or 1, Hkv or 1, T, n·unit)` of some of the tiles."""
        index = (self.index if self.index.shape[0] == 1 else self.index[batch])[:, :, tiles]
        if self.unit == 1:
            return index
        return (index[..., None] * self.unit + torch.arange(self.unit, device=index.device)).flatten(-2)


@dataclass(frozen=True, eq=False)
class Group:
    """Tiles of one shape, which one call of the kernel can take together.

    `seen` is a bool mask broadcastable to `(B, Hkv, T, bq, bk)`, or None where every pair is seen.
    """

    queries: Lists
    keys: Lists
    seen: Tensor | None = None

    @cached_property
    def additive(self) -> Tensor | None:
        """The mask as 0 and −inf, kept if it is small (shared by all tiles, say) and made step by step if not."""
        if self.seen is None or self.seen.numel() > 2**23:
            return None
        return torch.zeros(self.seen.shape, device=self.seen.device).masked_fill_(~self.seen, -torch.inf)

    @cached_property
    def dead(self) -> Tensor | None:
        """True where a query sees no key, broadcastable to `(B, Hkv, T, bq)`; None if there is no such query."""
        if self.seen is None:
            return None
        dead = ~self.seen.any(-1)
        return dead if bool(dead.any()) else None

    def steps(self, batch: int, bytes_per_tile: int) -> Iterator[tuple[slice, slice]]:
        """(batch slice, tile slice) pairs that cover the group, each about `STEP_BYTES` of gathered tokens."""
        tiles = self.queries.tiles
        room = max(1, STEP_BYTES // max(1, bytes_per_tile))
        together = max(1, room // tiles)
        for b in range(0, batch, together):
            for t in range(0, tiles, room):
                yield slice(b, min(b + together, batch)), slice(t, min(t + room, tiles))


@dataclass(frozen=True, eq=False)
class Tiling:
    """Every query in exactly one tile, except queries that see no key, which may be in none.

    Build one from a pattern with `plan.tiling(pattern, nq, nk)`, or from lists chosen by content (a route).
    """

    nq: int
    nk: int
    groups: tuple[Group, ...] = field(default_factory=tuple)

    @cached_property
    def covers(self) -> bool:
        """Whether every query is in a tile; if not, the output has rows that nobody writes."""
        return sum(g.queries.tiles * g.queries.length for g in self.groups) == self.nq

    @cached_property
    def pairs(self) -> int:
        """(query, key) pairs computed for one head, masked ones included."""
        return sum(g.queries.tiles * g.queries.length * g.keys.length for g in self.groups)
