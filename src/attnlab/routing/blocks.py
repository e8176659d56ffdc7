"""Sequences cut into blocks, and a choice of blocks as a pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.patterns import Pattern


@dataclass(frozen=True)
class Partition:
    """Sequences, packed one after the other, cut into consecutive blocks that never cross from one to the next.

    Blocks are of `size` tokens, and the last one of each sequence may be short; or they have the `sizes` given, of
    which `size` is the largest. Make them with `of` and `sized`.
    """

    size: int
    lengths: tuple[int, ...]
    sizes: tuple[int, ...] | None = None

    @classmethod
    def of(cls, size: int, lengths: int | Sequence[int]) -> Partition:
        """Blocks of `size` tokens of one sequence, or of several of the given lengths."""
        lengths = (lengths,) if isinstance(lengths, int) else tuple(lengths)
        if size < 1:
            raise ValueError(f"block must be at least 1, got {size}")
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths must be one or more positive integers, got {lengths}")
        return cls(min(size, max(lengths)), lengths)

    @classmethod
    def sized(cls, sizes: Sequence[int]) -> Partition:
        """Blocks of the given sizes, in order, of one sequence."""
        sizes = tuple(sizes)
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes must be one or more positive integers, got {sizes}")
        same = all(s == sizes[0] for s in sizes[:-1]) and sizes[-1] <= sizes[0]
        return cls(max(sizes), (sum(sizes),), None if same else sizes)

    @property
    def count(self) -> int:
        return sum(-(-n // self.size) for n in self.lengths) if self.sizes is None else len(self.sizes)

    @property
    def length(self) -> int:
        return sum(self.lengths)

    @property
    def uniform(self) -> bool:
        """Block i begins at token i·size: all but the last are of one size."""
        return self.sizes is None and all(n % self.size == 0 for n in self.lengths[:-1])

    @property
    def edges(self) -> Tensor:
        """The first token of each block, and the end: `(count + 1,)`."""
        if self.uniform:
            return (torch.arange(self.count + 1) * self.size).clamp(max=self.length)
        if self.sizes is not None:
            return torch.tensor([0, *accumulate(self.sizes)])
        starts = [0, *accumulate(self.lengths)]
        each = (range(a, b, self.size) for a, b in pairwise(starts))
        return torch.tensor([*chain.from_iterable(each), self.length])

    @property
    def numbers(self) -> Tensor:
        """Tokens of each block: `(count,)`."""
        return self.edges.diff()

    @property
    def sequence(self) -> Tensor:
        """To which of the packed sequences each block belongs: `(count,)`."""
        if len(self.lengths) == 1:
            return torch.zeros(self.count, dtype=torch.long)
        return torch.tensor([i for i, n in enumerate(self.lengths) for _ in range(-(-n // self.size))])

    def block(self, token: Tensor) -> Tensor:
        """The block that each token index lies in (the last one for indices past the end)."""
        if self.uniform:
            return torch.div(token, self.size, rounding_mode="floor").clamp(max=self.count - 1)
        return torch.bucketize(token, self.edges[1:-1].to(token.device), right=True)

    def mean(self, x: Tensor) -> Tensor:
        """The mean token of each block: `(…, length, D)` to `(…, count, D)`."""
        if self.size == 1:
            return x
        if self.uniform:
            padded = F.pad(x, (0, 0, 0, self.count * self.size - self.length))
            total = padded.unflatten(-2, (self.count, self.size)).sum(-2)
        else:
            owner = self.block(torch.arange(self.length, device=x.device))
            total = x.new_zeros(*x.shape[:-2], self.count, x.shape[-1]).index_add_(-2, owner, x)
        return total / self.numbers.to(x.device, x.dtype)[:, None]

    def first(self, x: Tensor) -> Tensor:
        """The first token of each block: `(…, length, D)` to `(…, count, D)`."""
        return x if self.size == 1 else x.index_select(-2, self.edges[:-1].to(x.device))


class Route:
    """Chooses from the content where each query may look."""

    def select(self, q: Tensor, k: Tensor) -> Pattern:
        """The pattern for heads `q (B, H, Nq, D)` and `k (B, Hkv, Nk, D)`. Not differentiable."""
        raise NotImplementedError


class Chosen(Pattern, Route):
    """What a route has chosen: a pattern that holds for one call, and the route that chooses just that.

    Two of them are never equal. Give them to `attend` as `route=`, and nothing is cached for what will not come again.
    """

    per_batch = True
    per_head = True
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def select(self, q: Tensor, k: Tensor) -> Pattern:
        self.check(q.shape[2], k.shape[2])
        return self


@dataclass(frozen=True, eq=False, repr=False)
class Routed(Chosen):
    """Chosen blocks: query block t sees key block c where `table[b, h, t, c]` is True.

    `table` is `(B or 1, H or 1, query blocks, key blocks)`, bool.
    """

    table: Tensor
    queries: Partition
    keys: Partition

    @classmethod
    def of(cls, index: Tensor, queries: Partition, keys: Partition) -> Routed:
        """From key-block numbers `(B or 1, H or 1, query blocks, K)` per query block."""
        table = torch.zeros(*index.shape[:-1], keys.count, dtype=torch.bool, device=index.device)
        return cls(table.scatter_(-1, index, True), queries, keys)

    def __post_init__(self) -> None:
        if self.table.dim() != 4 or self.table.shape[2:] != (self.queries.count, self.keys.count):
            wanted = f"(B, H, {self.queries.count}, {self.keys.count})"
            raise ValueError(f"Routed: table must have shape {wanted}, got {tuple(self.table.shape)}")

    def check(self, nq: int, nk: int) -> None:
        if (nq, nk) != (self.queries.length, self.keys.length):
            raise ValueError(
                f"Routed: chosen for {self.queries.length} queries and {self.keys.length} keys, "
                f"but there are {nq} queries and {nk} keys"
            )

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        batch, heads = self.table.shape[:2]
        b, h = (b if batch > 1 else torch.zeros_like(b)), (h if heads > 1 else torch.zeros_like(h))
        return self.table[b, h, self.queries.block(q), self.keys.block(k)]

    def density(self, nq: int | None = None, nk: int | None = None) -> float:
        """The share of pairs that are seen, over all batches and heads."""
        at = self.table.device
        tall, wide = self.queries.numbers.to(at).double(), self.keys.numbers.to(at).double()
        pairs = (self.table * wide).sum(-1) * tall
        return float(pairs.sum(-1).mean()) / (self.queries.length * self.keys.length)

    def __repr__(self) -> str:
        return (
            f"Routed({self.queries.count} query blocks of {self.queries.size}, {self.keys.count} key blocks of "
            f"{self.keys.size}, density {self.density():.3g})"
        )
