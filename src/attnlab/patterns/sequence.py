"""Patterns on a sequence: they know positions only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.patterns.base import Pattern, key_range, sorted_unique


def require_positive(owner: Pattern, *names: str) -> None:
    """Raise ValueError unless each named integer field of `owner` is at least 1."""
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(owner).__name__}: {name} must be an integer of at least 1, got {value!r}")


@dataclass(frozen=True)
class Full(Pattern):
    """Every query sees every key."""

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q == q) & (k == k)

    def density(self, nq: int, nk: int | None = None) -> float:
        return 1.0


@dataclass(frozen=True)
class Causal(Pattern):
    """Each query sees itself and the keys before it. Query 0 stands at key 0; `shift` moves the queries on."""

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q


@dataclass(frozen=True)
class Window(Pattern):
    """Each query sees itself and the `size - 1` keys before it (and as many after, if not causal)."""

    size: int
    causal: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "size")

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = q - k
        return (distance >= 0) & (distance < self.size) if self.causal else distance.abs() < self.size

    def tile_keys(self, tiles: Tensor, nk: int) -> Tensor:
        ahead = 0 if self.causal else self.size - 1
        return key_range(tiles.amin(1) - self.size + 1, tiles.amax(1) + ahead, nk)


@dataclass(frozen=True)
class Dilated(Pattern):
    """Each query sees every `step`-th key around it: `size` of them back, and as many ahead if not causal.

    `size=None` is without limit (the "strided" half of Sparse Transformers, arXiv 1904.10509).
    """

    step: int
    size: int | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "step", *(() if self.size is None else ("size",)))

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = q - k
        on_comb = distance % self.step == 0
        back = distance if self.causal else distance.abs()
        near = back >= 0
        if self.size is not None:
            near = near & (back < self.step * self.size)
        return on_comb & near

    def query_tiles(self, nq: int) -> Tensor:
        # The queries of one residue see the same comb.
        comb = -(-nq // self.step)
        tile = min(comb, 64)
        positions = torch.arange(-(-comb // tile) * tile) * self.step + torch.arange(self.step)[:, None]
        return positions.masked_fill(positions >= nq, -1).view(-1, tile)

    def tile_keys(self, tiles: Tensor, nk: int) -> Tensor | None:
        if (tiles % self.step != tiles[:, :1] % self.step).any():
            return None
        residue, comb = tiles[:, 0] % self.step, tiles // self.step
        back = comb.amax(1) + 1 if self.size is None else torch.full_like(residue, self.size)
        ahead = 0 if self.causal else self.size or nk
        keys = key_range(comb.amin(1) - back + 1, comb.amax(1) + ahead, -(-nk // self.step))
        keys = torch.where(keys >= 0, keys * self.step + residue[:, None], -1)
        return keys.masked_fill(keys >= nk, -1)


@dataclass(frozen=True)
class PowersOfTwo(Pattern):
    """Causal blocks at distances 0, 1, 2, 4, 8, …: any distance d is reached in popcount(d) ≤ log₂ d + 1 layers.

    Block distance δ = ⌊q/block⌋ − ⌊k/block⌋; key k ≤ q is visible if δ is 0 or a power of two, or δ < `window` blocks,
    or k lies in the first `sinks` blocks. Out-degree log₂ n. PowerAttention, arXiv 2503.03588 (these defaults).
    """

    block: int = 256
    window: int = 5
    sinks: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "block", "window")
        if self.sinks < 0:
            raise ValueError(f"PowersOfTwo: sinks must be 0 or more, got {self.sinks}")

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        key_block = k // self.block
        delta = q // self.block - key_block
        # d & (d − 1) clears the lowest set bit, so it is 0 exactly for 0 and the powers of two.
        power = (delta & (delta - 1)) == 0
        return (k <= q) & (power | (delta < self.window) | (key_block < self.sinks))

    def query_tiles(self, nq: int) -> Tensor | None:
        # Tiles within one block, unless blocks are tiny: queries of two blocks share few keys.
        tile = max(16, *(n for n in range(1, 65) if self.block % n == 0))
        positions = torch.arange(-(-nq // tile) * tile)
        return positions.masked_fill(positions >= nq, -1).view(-1, tile)

    def tile_keys(self, tiles: Tensor, nk: int) -> Tensor:
        newest = tiles.amax(1) // self.block
        oldest = tiles.amin(1) // self.block
        powers = [2**i for i in range(max(1, int(newest.max())).bit_length())]
        deltas = torch.tensor(sorted({*range(self.window), *powers}), device=tiles.device)
        # A tile may straddle blocks; the distances count from each of its blocks.
        spread = torch.arange(int((newest - oldest).max()) + 1, device=tiles.device)
        blocks = (oldest[:, None, None] + spread[:, None] - deltas).flatten(1)
        sinks = torch.arange(self.sinks, device=tiles.device).expand(len(tiles), -1)
        blocks = torch.cat([blocks, sinks], 1)
        blocks = sorted_unique(blocks.masked_fill(blocks > newest[:, None], -1))
        keys = (blocks[..., None] * self.block + torch.arange(self.block, device=tiles.device)).flatten(1)
        return keys.masked_fill((keys < 0) | (keys >= nk), -1)


@dataclass(frozen=True)
class Sinks(Pattern):
    """Every query sees the first `count` keys. Combine: `Window(512) | (Sinks(4) & Causal())` is StreamingLLM."""

    count: int

    def __post_init__(self) -> None:
        require_positive(self, "count")

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k < self.count) & (q == q)

    def tile_keys(self, tiles: Tensor, nk: int) -> Tensor:
        return torch.arange(min(self.count, nk), device=tiles.device).expand(len(tiles), -1)


@dataclass(frozen=True)
class Prefix(Pattern):
    """The first `count` tokens see each other, and all see them; the rest is causal (prefix language models)."""

    count: int

    def __post_init__(self) -> None:
        require_positive(self, "count")

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) | (k < self.count)


@dataclass(frozen=True)
class Documents(Pattern):
    """Packed sequences: a query sees the keys of its own document. `lengths` are the documents' lengths, in order."""

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(int(n) for n in self.lengths))
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"Documents: lengths must be one or more positive integers, got {self.lengths}")

    def check(self, nq: int, nk: int) -> None:
        total = sum(self.lengths)
        if nq > total or nk != total:
            raise ValueError(f"Documents: lengths sum to {total}, but there are {nq} queries and {nk} keys")

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        ends = torch.tensor(self.lengths, device=q.device).cumsum(0)
        return torch.bucketize(q, ends, right=True) == torch.bucketize(k, ends, right=True)

    def tile_keys(self, tiles: Tensor, nk: int) -> Tensor:
        ends = torch.tensor(self.lengths, device=tiles.device).cumsum(0)
        starts = ends - torch.tensor(self.lengths, device=tiles.device)
        first, last = (torch.bucketize(x, ends, right=True) for x in (tiles.amin(1), tiles.amax(1)))
        return key_range(starts[first], ends[last] - 1, nk)
