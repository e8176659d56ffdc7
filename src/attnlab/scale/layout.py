"""Which tokens lie on which rank: contiguous blocks, a zigzag, or what balances the work of a pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from attnlab.patterns import Pattern
from attnlab.scale.visible import pairs

Range = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """Each rank's tokens as ranges `[start, stop)` of the whole sequence, ascending; together they are all of it.

    >>> Layout.zigzag(16, 2).pieces
    (((0, 4), (12, 16)), ((4, 12),))
    """

    pieces: tuple[tuple[Range, ...], ...]

    def __post_init__(self) -> None:
        merged = tuple(_joined(p) for p in self.pieces)
        object.__setattr__(self, "pieces", merged)
        at = 0
        for start, stop in sorted(r for rank in merged for r in rank):
            if start != at:
                raise ValueError(f"pieces must hold every token once, but token {min(start, at)} is not held once")
            at = stop
        if not at:
            raise ValueError("pieces must hold at least one token")

    @classmethod
    def contiguous(cls, length: int, ranks: int) -> Layout:
        """Blocks of ⌈length / ranks⌉ tokens, the last one shorter."""
        _check(length, ranks)
        size = -(-length // ranks)
        return cls(tuple(((min(r * size, length), min((r + 1) * size, length)),) for r in range(ranks)))

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> Layout:
        """Blocks of the given lengths, one after the other."""
        ends = [0]
        for n in lengths:
            ends.append(ends[-1] + int(n))
        return cls(tuple(((a, b),) for a, b in pairwise(ends)))

    @classmethod
    def zigzag(cls, length: int, ranks: int) -> Layout:
        """2R chunks, of which rank r holds r and 2R − 1 − r: under a causal mask, all ranks have the same work."""
        _check(length, ranks)
        cuts = [i * length // (2 * ranks) for i in range(2 * ranks + 1)]
        chunks = list(pairwise(cuts))
        return cls(tuple((chunks[r], chunks[2 * ranks - 1 - r]) for r in range(ranks)))

    @classmethod
    def balanced(cls, pattern: Pattern, length: int, ranks: int, *, chunks: int = 0) -> Layout:
        """As many tokens for each rank (to within one chunk's rounding), and as even in the pattern's pairs as can be.

        The sequence is cut into chunks, whose visible pairs are counted; the heaviest go first, each to the rank that
        has the least so far and room for more. A layout of few pieces is taken where it is as even: contiguous blocks,
        the zigzag, then 2, 4 and 8 chunks per rank (or `chunks`).
        """
        _check(length, ranks)
        found: list[tuple[float, Layout]] = []
        plain = [] if chunks else [cls.contiguous(length, ranks), cls.zigzag(length, ranks)]
        for layout in (*plain, *(cls._dealt(pattern, length, ranks, c) for c in ([chunks] if chunks else (2, 4, 8)))):
            work = layout.work(pattern)
            found.append((max(work) * ranks / max(sum(work), 1.0), layout))
            if found[-1][0] <= 1.02:
                break
        return min(found, key=lambda pair: pair[0])[1]

    @classmethod
    def _dealt(cls, pattern: Pattern, length: int, ranks: int, each: int) -> Layout:
        count = ranks * each
        if count > length:
            return cls.contiguous(length, ranks)
        chunks = list(pairwise(i * length // count for i in range(count + 1)))
        work = {chunk: pairs(pattern, chunk, (0, length)) for chunk in chunks}
        load, held = [0.0] * ranks, [list[Range]() for _ in range(ranks)]
        for chunk in sorted(chunks, key=lambda c: -work[c]):
            rank = min((r for r in range(ranks) if len(held[r]) < each), key=lambda r: (load[r], r))
            held[rank].append(chunk)
            load[rank] += work[chunk]
        return cls(tuple(tuple(sorted(h)) for h in held))

    def groups(self, size: int) -> tuple[Layout, tuple[Layout, ...]]:
        """Of groups of `size` successive ranks: the layout over the groups, and of each group that of its ranks.

        Within a group, tokens count as they lie in the group.
        """
        if self.ranks % size:
            raise ValueError(f"size must divide the {self.ranks} ranks, got {size}")
        parts = [self.pieces[i : i + size] for i in range(0, self.ranks, size)]
        whole = Layout(tuple(tuple(r for rank in part for r in rank) for part in parts))
        inner = (
            Layout(tuple(tuple((_within(held, a), _within(held, a) + b - a) for a, b in rank) for rank in part))
            for part, held in zip(parts, whole.pieces, strict=True)
        )
        return whole, tuple(inner)

    @property
    def ranks(self) -> int:
        return len(self.pieces)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each rank holds."""
        return tuple(sum(b - a for a, b in rank) for rank in self.pieces)

    @cached_property
    def length(self) -> int:
        return sum(self.lengths)

    def work(self, pattern: Pattern) -> list[float]:
        """How many pairs each rank's queries see: exact for patterns that know, or a fine sample of large ones."""
        return [sum(pairs(pattern, piece, (0, self.length)) for piece in rank) for rank in self.pieces]

    def positions(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """Where each of a rank's tokens stands in the whole sequence, `(n,)`."""
        return torch.cat([torch.arange(a, b, device=device) for a, b in self.pieces[rank]])

    def shard(self, x: Tensor, rank: int, dim: int = -2) -> Tensor:
        """The rank's part of the whole `x`, whose axis `dim` is the sequence."""
        if x.shape[dim] != self.length:
            raise ValueError(f"x must have {self.length} tokens on axis {dim}, got {tuple(x.shape)}")
        parts = [x.narrow(dim, a, b - a) for a, b in self.pieces[rank]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def whole(self, shards: Sequence[Tensor], dim: int = -2) -> Tensor:
        """What `shard` cut, put together again."""
        if len(shards) != self.ranks or any(s.shape[dim] != n for s, n in zip(shards, self.lengths, strict=False)):
            raise ValueError(f"shards must be {self.ranks} of {self.lengths} tokens, got {[s.shape for s in shards]}")
        return torch.cat(list(shards), dim).index_select(dim, self.order(shards[0].device).argsort())

    def order(self, device: torch.device | str | None = None) -> Tensor:
        """The positions of all tokens as they lie, rank after rank."""
        return torch.cat([self.positions(r, device) for r in range(self.ranks)])

    @property
    def in_order(self) -> bool:
        """Whether the tokens lie rank after rank as in the sequence."""
        flat = [r for rank in self.pieces for r in rank]
        return flat == sorted(flat)


def _joined(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Without empty ranges, and with those joined that touch; an empty rank keeps one empty range."""
    found: list[Range] = []
    for a, b in sorted((int(a), int(b)) for a, b in ranges):
        if a > b or a < 0:
            raise ValueError(f"pieces must be ranges [start, stop), got {(a, b)}")
        if found and found[-1][1] == a:
            found[-1] = (found[-1][0], b)
        elif b > a:
            found.append((a, b))
    return tuple(found) or ((0, 0),)


def _within(held: Sequence[Range], position: int) -> int:
    """How many of the tokens held come before a position."""
    return sum(min(b, position) - a for a, b in held if a < position)


def _check(length: int, ranks: int) -> None:
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    if length < ranks:
        raise ValueError(f"length must be at least one token for each of {ranks} ranks, got {length}")
