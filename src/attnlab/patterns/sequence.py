"""Patterns on a sequence: they know positions only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.patterns.base import Pattern


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


@dataclass(frozen=True)
class Sinks(Pattern):
    """Every query sees the first `count` keys. Combine: `Window(512) | (Sinks(4) & Causal())` is StreamingLLM."""

    count: int

    def __post_init__(self) -> None:
        require_positive(self, "count")

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k < self.count) & (q == q)


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
