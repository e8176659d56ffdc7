"""A tiling: which queries are computed together, and which keys each such tile looks among."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

# One step of the kernel writes about this much: more would be memory fetched anew, less would be all overhead.
STEP_BYTES = 12 * 2**20


@dataclass(frozen=True, eq=False)
class Lists:
    """The token numbers of each tile: `index (B or 1, Hkv or 1, T, n)`, in units of `unit` adjacent tokens.

    Where the tiles lie evenly in the sequence (tile t holds start + t·step + 0…n−1) `run` says so, and the kernel
    looks at the tokens in place instead of copying them. Lists of queries are the same for all: `(1, 1, T, n)`.
    """

    index: Tensor
    unit: int = 1

    @property
    def tiles(self) -> int:
        return self.index.shape[2]

    @property
    def shared(self) -> bool:
        """Whether all heads look among the same keys."""
        return self.index.shape[1] == 1

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
        if step < 0 or 0 < 16 * step < index.shape[1]:
            return None
        even = start + step * torch.arange(len(index), device=index.device)[:, None]
        even = even + torch.arange(index.shape[1], device=index.device)
        return (start, step) if torch.equal(index, even) else None

    def tokens(self, batch: slice, tiles: slice) -> Tensor:
        """Token numbers `(B or 1, Hkv or 1, T, n·unit)` of some of the tiles."""
        index = (self.index if self.index.shape[0] == 1 else self.index[batch])[:, :, tiles]
        if self.unit == 1:
            return index
        return (index[..., None] * self.unit + torch.arange(self.unit, device=index.device)).flatten(-2)


@dataclass(frozen=True, eq=False)
class Group:
    """Tiles of one shape, which one call of the kernel can take together.

    `seen` is a bool mask broadcastable to `(B, Hkv, T, bq, bk)`, or None where every pair is seen. `causal` says that
    place i of a tile's queries sees places 0…i of its keys, which needs no mask.
    """

    queries: Lists
    keys: Lists
    seen: Tensor | None = None
    causal: bool = False

    @cached_property
    def additive(self) -> Tensor | None:
        """The mask as 0 and −inf, kept if it is small (shared by all tiles, say) and made step by step if not."""
        if self.seen is None or self.seen.numel() > 2**23:
            return None
        return torch.zeros(self.seen.shape, device=self.seen.device).masked_fill_(~self.seen, -torch.inf)

    @cached_property
    def dead(self) -> bool:
        """Whether some query sees no key."""
        return self.seen is not None and not bool(self.seen.any(-1).all())

    def steps(self, batch: int, bytes_per_tile: int) -> Iterator[tuple[slice, slice]]:
        """(batch slice, tile slice) pairs that cover the group, each about `STEP_BYTES`."""
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
    groups: tuple[Group, ...] = ()

    @cached_property
    def order(self) -> Tensor | None:
        """The queries tile after tile, then those in no tile; None if that is the order they are in."""
        parts = [g.queries.tokens(slice(0, 1), slice(None)).flatten() for g in self.groups]
        listed = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)
        rest = torch.ones(self.nq, dtype=torch.bool, device=listed.device)
        rest[listed] = False
        order = torch.cat([listed, rest.nonzero()[:, 0]])
        return None if torch.equal(order, torch.arange(self.nq, device=order.device)) else order

    @cached_property
    def inverse(self) -> Tensor | None:
        """The place of each query in `order`."""
        return None if self.order is None else self.order.argsort()

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """The place in `order` at which each group begins."""
        sizes = [g.queries.tiles * g.queries.length for g in self.groups]
        return tuple(itertools.accumulate(sizes, initial=0))[:-1]

    @cached_property
    def listed(self) -> int:
        """How many queries are in some tile; the others come last in `order`."""
        return sum(g.queries.tiles * g.queries.length for g in self.groups)

    @cached_property
    def in_place(self) -> bool:
        """Whether the kernel looks at most keys where they lie."""
        copied = sum(g.keys.tiles * g.keys.length for g in self.groups if g.keys.run is None)
        return 8 * copied < sum(g.keys.tiles * g.keys.length for g in self.groups)

    @cached_property
    def bytes(self) -> int:
        """Memory that the lists and masks take."""
        lists = sum(8 * (g.queries.index.numel() + g.keys.index.numel()) for g in self.groups)
        return lists + sum(g.seen.numel() for g in self.groups if g.seen is not None)

    @cached_property
    def pairs(self) -> int:
        """(query, key) pairs computed for one head, masked ones included."""
        return sum(g.queries.tiles * g.queries.length * g.keys.length for g in self.groups)


def kinds_of(tiles: Tensor) -> Tensor:
    """A number for each of the tiles `(T, …)`, equal for equal ones: by a hash, then checked."""
    flat = tiles.flatten(1)
    if flat.dtype != torch.int64:
        flat = F.pad(flat, (0, -flat.shape[1] % 8)).contiguous().view(torch.int64)
    random = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (flat.shape[1],), generator=random).to(flat.device)
    kinds = (flat * factors).sum(1).unique(return_inverse=True)[1]
    first = torch.full((int(kinds.max()) + 1,), len(kinds), device=kinds.device)
    first.scatter_reduce_(0, kinds, torch.arange(len(kinds), device=kinds.device), "amin")
    equal = all(torch.equal(flat[first[k]], w) for k, w in zip(kinds.split(1024), flat.split(1024), strict=True))
    return kinds if equal else torch.arange(len(kinds), device=kinds.device)
