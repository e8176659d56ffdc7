"""Patterns of stretches: blocks that are read whole, starts of documents, late queries, and rectangles."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor

from attnlab.patterns.base import Pattern, key_range
from attnlab.patterns.sequence import require_positive


@dataclass(frozen=True)
class BlockCausal(Pattern):
    """Causal by blocks: each query sees the blocks of `size` tokens before its own, and its own to the end.

    k < (⌊q / size⌋ + 1) · size + extra. `extra` more keys are seen beyond the block.
    """

    size: int
    extra: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "size")
        if self.extra < 0:
            raise ValueError(f"BlockCausal: extra must be 0 or more, got {self.extra}")

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k < (torch.div(q, self.size, rounding_mode="floor") + 1) * self.size + self.extra

    def tile_keys(self, tiles: Tensor, nk: int) -> Tensor:
        last = (torch.div(tiles.amax(1), self.size, rounding_mode="floor") + 1) * self.size + self.extra - 1
        return key_range(torch.zeros_like(last), last, nk)


@dataclass(frozen=True)
class Starts(Pattern):
    """Every query sees the first `count` keys of each document (see `Documents`)."""

    lengths: tuple[int, ...]
    count: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(int(n) for n in self.lengths))
        require_positive(self, "count")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"Starts: lengths must be one or more positive integers, got {self.lengths}")

    def check(self, nq: int, nk: int) -> None:
        if nk != sum(self.lengths):
            raise ValueError(f"Starts: lengths sum to {sum(self.lengths)}, but there are {nk} keys")

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        ends = torch.tensor(list(accumulate(self.lengths)), device=k.device)
        starts = ends - torch.tensor(self.lengths, device=k.device)
        return (k - starts[torch.bucketize(k, ends, right=True)] < self.count) & (q == q)


@dataclass(frozen=True)
class From(Pattern):
    """The queries at or after position `start` see everything, those before it nothing. `~From(n)` is the reverse."""

    start: int

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= self.start) & (k == k)


Shape = Literal["full", "causal", "inverse", "both"]


@dataclass(frozen=True)
class Rectangle:
    """Queries [q, q_end) and keys [k, k_end), all of whose pairs are seen, or those on one side of a diagonal.

    "causal": the diagonal ends at the last query and key; "inverse": keys on and after the one that starts at the
    first query and key; "both": between the two, empty if there are fewer keys than queries.
    """

    q: int
    q_end: int
    k: int
    k_end: int
    shape: Shape = "full"

    def __post_init__(self) -> None:
        if not (0 <= self.q < self.q_end and 0 <= self.k < self.k_end):
            raise ValueError(
                f"Rectangle: must not be empty, got queries {self.q}:{self.q_end}, keys {self.k}:{self.k_end}"
            )
        if self.shape not in get_args(Shape):
            raise ValueError(f"Rectangle: shape must be one of {', '.join(get_args(Shape))}, got {self.shape!r}")

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        seen = (q >= self.q) & (q < self.q_end) & (k >= self.k) & (k < self.k_end)
        if self.shape in ("causal", "both"):
            seen = seen & (k - self.k_end <= q - self.q_end)
        if self.shape in ("inverse", "both"):
            seen = seen & (k - self.k >= q - self.q)
        return seen


@dataclass(frozen=True)
class Rectangles(Pattern):
    """What any of several rectangles shows: the range form of masks that fused kernels read."""

    parts: tuple[Rectangle, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts or not all(isinstance(part, Rectangle) for part in self.parts):
            raise TypeError(f"Rectangles: parts must be one or more Rectangles, got {self.parts!r}")

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (q != q) & (k == k)
        for part in self.parts:
            seen = seen | part.allows(q, k)
        return seen
