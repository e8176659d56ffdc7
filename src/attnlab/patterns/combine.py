"""Patterns made from patterns: and, or, not, and a shift of the queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.patterns.base import Pattern, sorted_unique


@dataclass(frozen=True)
class _Pair(Pattern):
    left: Pattern
    right: Pattern

    def __post_init__(self) -> None:
        # An instance's own answer hides the class's default; frozen dataclasses need the long way to say so.
        object.__setattr__(self, "per_batch", self.left.per_batch or self.right.per_batch)
        object.__setattr__(self, "per_head", self.left.per_head or self.right.per_head)

    def check(self, nq: int, nk: int) -> None:
        self.left.check(nq, nk)
        self.right.check(nq, nk)

    def query_tiles(self, nq: int) -> Tensor | None:
        tiles = self.left.query_tiles(nq)
        return self.right.query_tiles(nq) if tiles is None else tiles


@dataclass(frozen=True)
class And(_Pair):
    """Keys that both patterns allow: `p & q`."""

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.left.allows(b, h, q, k) & self.right.allows(b, h, q, k)

    def tile_keys(self, tiles: Tensor, nk: int) -> Tensor | None:
        # Either side's keys hold all that both allow: take the shorter lists.
        lists = [keys for keys in (self.left.tile_keys(tiles, nk), self.right.tile_keys(tiles, nk)) if keys is not None]
        return min(lists, key=lambda keys: keys.shape[1]) if lists else None

    def at(self, b: int, h: int) -> Pattern:
        return And(self.left.at(b, h), self.right.at(b, h))

    def __str__(self) -> str:
        return f"({self.left} & {self.right})"


@dataclass(frozen=True)
class Or(_Pair):
    """Keys that either pattern allows: `p | q`."""

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.left.allows(b, h, q, k) | self.right.allows(b, h, q, k)

    def tile_keys(self, tiles: Tensor, nk: int) -> Tensor | None:
        left, right = self.left.tile_keys(tiles, nk), self.right.tile_keys(tiles, nk)
        return None if left is None or right is None else sorted_unique(torch.cat([left, right], 1))

    def at(self, b: int, h: int) -> Pattern:
        return Or(self.left.at(b, h), self.right.at(b, h))

    def __str__(self) -> str:
        return f"({self.left} | {self.right})"


@dataclass(frozen=True)
class _Single(Pattern):
    pattern: Pattern

    def __post_init__(self) -> None:
        object.__setattr__(self, "per_batch", self.pattern.per_batch)
        object.__setattr__(self, "per_head", self.pattern.per_head)


@dataclass(frozen=True)
class Not(_Single):
    """Keys that the pattern does not allow: `~p`."""

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ~self.pattern.allows(b, h, q, k)

    def query_tiles(self, nq: int) -> Tensor | None:
        return self.pattern.query_tiles(nq)

    def at(self, b: int, h: int) -> Pattern:
        return Not(self.pattern.at(b, h))

    def check(self, nq: int, nk: int) -> None:
        self.pattern.check(nq, nk)

    def __str__(self) -> str:
        return f"~{self.pattern}"


@dataclass(frozen=True)
class Shifted(_Single):
    """A pattern seen by queries whose first is at position `offset`: query 0 stands where query `offset` stood."""

    offset: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offset < 0:
            raise ValueError(f"offset must be 0 or more, got {self.offset}")

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.pattern.allows(b, h, q + self.offset, k)

    def tile_keys(self, tiles: Tensor, nk: int) -> Tensor | None:
        return self.pattern.tile_keys(tiles + self.offset, nk)

    def at(self, b: int, h: int) -> Pattern:
        return Shifted(self.pattern.at(b, h), self.offset)

    def check(self, nq: int, nk: int) -> None:
        self.pattern.check(nq + self.offset, nk)


@dataclass(frozen=True)
class At(Pattern):
    """What one batch entry and head sees of a pattern that depends on them."""

    pattern: Pattern
    b: int
    h: int

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.pattern.allows(torch.full_like(b, self.b), torch.full_like(h, self.h), q, k)

    def check(self, nq: int, nk: int) -> None:
        self.pattern.check(nq, nk)
