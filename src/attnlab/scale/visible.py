"""Which ranges of keys a range of queries sees, told from the pattern: nobody sends what nobody will look at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from attnlab.patterns import And, Causal, Documents, Full, Not, Or, Pattern, Prefix, Shifted, Sinks, Window

Range = tuple[int, int]
NONE, SOME, ALL = 0, 1, 2

# Pairs of which `allows` is asked outright, and how finely ranges are cut to find what nobody sees.
_ASKED = 2**22
_GRANULES = 16


def relation(pattern: Pattern, q: Range, k: Range) -> int:
    """Whether the queries `q` see NONE, SOME or ALL of the keys `k`; SOME also where that is not sure."""
    (q0, q1), (k0, k1) = q, k
    if q1 <= q0 or k1 <= k0:
        return NONE
    low, high = q0 - (k1 - 1), (q1 - 1) - k0  # the distances q − k that occur
    if isinstance(pattern, Full):
        return ALL
    if isinstance(pattern, Causal):
        return ALL if low >= 0 else NONE if high < 0 else SOME
    if isinstance(pattern, Window):
        back, ahead = pattern.size - 1, 0 if pattern.causal else pattern.size - 1
        return ALL if low >= -ahead and high <= back else NONE if high < -ahead or low > back else SOME
    if isinstance(pattern, Sinks):
        return ALL if k1 <= pattern.count else NONE if k0 >= pattern.count else SOME
    if isinstance(pattern, Prefix):
        return max(relation(Causal(), q, k), relation(Sinks(pattern.count), q, k))
    if isinstance(pattern, Documents):
        return _documents(pattern, q, k)
    if isinstance(pattern, Shifted):
        return relation(pattern.pattern, (q0 + pattern.offset, q1 + pattern.offset), k)
    if isinstance(pattern, Not):
        return 2 - relation(pattern.pattern, q, k)
    if isinstance(pattern, (And, Or)):
        both = relation(pattern.left, q, k), relation(pattern.right, q, k)
        found = min(both) if isinstance(pattern, And) else max(both)
        if found != SOME or (_tells(pattern) and (q1 - q0) * (k1 - k0) > 2**16):
            return found
    if pattern.per_batch or pattern.per_head:
        return SOME
    if (q1 - q0) * (k1 - k0) <= _ASKED:
        seen = _allowed(pattern, torch.arange(q0, q1), torch.arange(k0, k1))
        return ALL if bool(seen.all()) else SOME if bool(seen.any()) else NONE
    listed = pattern.tile_keys(_tiles(q0, q1), k1)
    return SOME if listed is None or bool((listed >= k0).any()) else NONE


def _tiles(q0: int, q1: int, size: int = 64) -> Tensor:
    at = torch.arange(q0, q0 + -(-(q1 - q0) // size) * size)
    return at.clamp_max(q1 - 1).view(-1, size)


def _allowed(pattern: Pattern, q: Tensor, k: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.long)
    return pattern.allows(zero, zero, q[:, None], k).expand(len(q), len(k))


def _documents(pattern: Documents, q: Range, k: Range) -> int:
    ends = torch.tensor(pattern.lengths).cumsum(0)
    of = torch.bucketize(torch.tensor([q[0], q[1] - 1, k[0], k[1] - 1]), ends, right=True).tolist()
    if of[1] < of[2] or of[3] < of[0]:
        return NONE
    return ALL if len(set(of)) == 1 else SOME


@lru_cache(4096)
def pairs(pattern: Pattern, q: Range, k: Range) -> float:
    """How many pairs of the two ranges are visible: counted, or of more than 2³⁰ pairs estimated along the edges."""
    if pattern.per_batch or pattern.per_head:
        pattern = pattern.at(0, 0)
    return _count(pattern, q, k, max(2**16, (q[1] - q[0]) * (k[1] - k[0]) // 2**14))


def _count(pattern: Pattern, q: Range, k: Range, leaf: int) -> float:
    area = (q[1] - q[0]) * (k[1] - k[0])
    found = relation(pattern, q, k)
    if found != SOME:
        return float(area) if found == ALL else 0.0
    if isinstance(pattern, Causal):
        return _causal(q, k)
    if area > (
        leaf if _tells(pattern) else max(leaf, _ASKED)
    ):  # halve the longer side: most of the halves are seen in full or not at all
        (a, b), (c, d) = q, k
        if b - a >= d - c:
            return _count(pattern, (a, (a + b) // 2), k, leaf) + _count(pattern, ((a + b) // 2, b), k, leaf)
        return _count(pattern, q, (c, (c + d) // 2), leaf) + _count(pattern, q, ((c + d) // 2, d), leaf)
    if area <= max(2**16, 0 if _tells(pattern) else _ASKED):
        return float(_allowed(pattern, torch.arange(*q), torch.arange(*k)).sum())
    rows, columns = (torch.linspace(r[0], r[1] - 1, 128).round().long() for r in (q, k))
    return float(_allowed(pattern, rows, columns).double().mean()) * area


def _tells(pattern: Pattern) -> bool:
    """Whether `relation` knows the pattern, without asking it about pairs."""
    if isinstance(pattern, (And, Or)):
        return _tells(pattern.left) and _tells(pattern.right)
    if isinstance(pattern, (Not, Shifted)):
        return _tells(pattern.pattern)
    return isinstance(pattern, (Full, Causal, Window, Sinks, Prefix, Documents))


def _causal(q: Range, k: Range) -> float:
    """Σ over the queries of how many of the keys lie at or before them."""

    def below(n: int) -> int:
        """Pairs k ≤ i of queries 0 … n − 1 with keys from k[0] on."""
        m = max(0, n - k[0])
        return m * (m + 1) // 2

    def beyond(n: int) -> int:
        m = max(0, n - k[1])
        return m * (m + 1) // 2

    return float(below(q[1]) - below(q[0]) - (beyond(q[1]) - beyond(q[0])))


@dataclass(frozen=True)
class Between(Pattern):
    """A pattern seen by queries that begin at `q0`, over keys that begin at `k0`: a block of its matrix."""

    pattern: Pattern
    q0: int
    k0: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "per_batch", self.pattern.per_batch)
        object.__setattr__(self, "per_head", self.pattern.per_head)

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.pattern.allows(b, h, q + self.q0, k + self.k0)

    def tile_keys(self, tiles: Tensor, nk: int) -> Tensor | None:
        if self.k0 and not isinstance(self.pattern, Window):
            return None  # most of what it lists would lie outside
        listed = self.pattern.tile_keys(torch.where(tiles < 0, tiles, tiles + self.q0), nk + self.k0)
        return None if listed is None else torch.where(listed >= self.k0, listed - self.k0, -1)

    def at(self, b: int, h: int) -> Pattern:
        return Between(self.pattern.at(b, h), self.q0, self.k0)


def between(pattern: Pattern, q: Range, k: Range) -> Pattern | None:
    """The block of `pattern` for two ranges, in the simplest words: None where all is seen."""
    if relation(pattern, q, k) == ALL:
        return None
    if q[0] == k[0] and isinstance(pattern, (Causal, Window)):
        return pattern
    if isinstance(pattern, Causal) and q[0] > k[0]:
        return pattern.starting_at(q[0] - k[0])
    return Between(pattern, q[0], k[0])


class Block(NamedTuple):
    """A rectangle of pairs: rows of the queries held here, rows of what was sent, and their pattern (None: all)."""

    q: slice
    k: slice
    pattern: Pattern | None
    at: tuple[Range, ...]  # where the queries stand in the sequence, piece by piece
    keys_at: tuple[Range, ...]


@lru_cache(4096)
def needed(pattern: Pattern, queries: tuple[Range, ...], keys: tuple[Range, ...]) -> tuple[Range, ...]:
    """The ranges among `keys` of which some query of `queries` sees something; what is sent, cut finely."""
    found: list[Range] = []
    for start, stop in keys:
        if stop <= start:
            continue
        size = max(1, -(-(stop - start) // _GRANULES))
        for a in range(start, stop, size):
            b = min(a + size, stop)
            if any(relation(pattern, q, (a, b)) for q in queries):
                if found and found[-1][1] == a and a != start:
                    found[-1] = (found[-1][0], b)
                else:
                    found.append((a, b))
    return tuple(found)


@lru_cache(4096)
def blocks(
    pattern: Pattern, queries: tuple[Range, ...], keys: tuple[Range, ...], longest: int | None = None
) -> tuple[Block, ...]:
    """How the queries held here attend to the ranges `keys` that came: few rectangles, the plain ones joined.

    `longest` bounds the keys of one.
    """
    if longest is not None:
        keys = tuple((i, min(i + longest, b)) for a, b in keys for i in range(a, b, longest))
    rows, columns = _slices(queries), _slices(keys)
    found: list[Block] = []
    for j, key in enumerate(keys):
        i = 0
        while i < len(queries):
            seen, last = relation(pattern, queries[i], key), i
            while seen == ALL and last + 1 < len(queries) and relation(pattern, queries[last + 1], key) == ALL:
                last += 1
            if seen:
                part = None if seen == ALL else between(pattern, queries[i], key)
                whole = slice(rows[i].start, rows[last].stop)
                found.append(Block(whole, columns[j], part, queries[i : last + 1], (key,)))
            i = last + 1
    joined: list[Block] = []
    for block in found:
        before = next((o for o in joined if _continues(o, block, longest)), None)
        if before is None:
            joined.append(block)
        else:
            both = slice(before.k.start, block.k.stop)
            joined[joined.index(before)] = before._replace(k=both, keys_at=before.keys_at + block.keys_at)
    return tuple(joined)


def _continues(before: Block, block: Block, longest: int | None) -> bool:
    plain = before.pattern is None and block.pattern is None
    fits = longest is None or block.k.stop - before.k.start <= longest
    return plain and fits and before.q == block.q and before.k.stop == block.k.start


def _slices(ranges: tuple[Range, ...]) -> list[slice]:
    found, at = [], 0
    for a, b in ranges:
        found.append(slice(at, at + b - a))
        at += b - a
    return found
