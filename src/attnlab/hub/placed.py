"""Patterns for parts of a call: seen from other positions, or asked of a host model's own function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnlab.patterns import And, Causal, Or, Pattern, PowersOfTwo, Window
from attnlab.patterns.base import key_range

Ask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Placed(Pattern):
    """`pattern` where query 0 stands at position `queries` and key 0 at position `keys`, which may be negative."""

    pattern: Pattern
    queries: int
    keys: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "per_batch", self.pattern.per_batch)
        object.__setattr__(self, "per_head", self.pattern.per_head)

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.pattern.allows(b, h, q + self.queries, k + self.keys)

    def tile_keys(self, tiles: Tensor, nk: int) -> Tensor | None:
        listed = self.pattern.tile_keys((tiles + self.queries).clamp_min(0), nk + self.keys)
        return None if listed is None else torch.where(listed >= max(self.keys, 0), listed - self.keys, -1)

    def at(self, b: int, h: int) -> Pattern:
        return Placed(self.pattern.at(b, h), self.queries, self.keys)

    def __str__(self) -> str:
        return f"{self.pattern} from ({self.queries}, {self.keys})"


def placed(pattern: Pattern, queries: int, keys: int) -> Pattern:
    return pattern if queries == keys == 0 else Placed(pattern, queries, keys)


@dataclass(frozen=True, eq=False)
class Asked(Pattern):
    """What a host's own function allows, asked pair by pair; equal to itself alone, as the function is.

    `batch` are the host's batch entries, `queries` and `keys` the host's numbers of the first of each, `heads` whether
    the function tells heads apart. If `window` is given, no query sees a key that is further away.
    """

    ask: Ask
    batch: Tensor
    queries: int = 0
    keys: int = 0
    window: int | None = None
    heads: bool = False
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        object.__setattr__(self, "per_batch", len(self.batch) > 1)
        object.__setattr__(self, "per_head", self.heads)

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        b = self.batch.to(b.device)[b] if self.per_batch else torch.full_like(b, int(self.batch[0]))
        return self.ask(b, h, q + self.queries, k + self.keys)

    def tile_keys(self, tiles: Tensor, nk: int) -> Tensor | None:
        if self.window is None:
            return None
        apart = self.queries - self.keys
        return key_range(tiles.amin(1) + apart - self.window, tiles.amax(1) + apart + self.window, nk)

    def at(self, b: int, h: int) -> Pattern:
        whole = self.ask
        one = self.batch[b : b + 1] if self.per_batch else self.batch
        ask = (lambda i, _, q, k: whole(i, torch.full_like(i, h), q, k)) if self.heads else whole
        return Asked(ask, one, self.queries, self.keys, self.window)

    def cut(self, batch: Tensor | None, queries: int, keys: int) -> Asked:
        """The same for some of the batch entries, without the first queries and keys."""
        chosen = self.batch if batch is None else self.batch[batch]
        return replace(self, batch=chosen, queries=self.queries + queries, keys=self.keys + keys)


def hides_the_future(where: Pattern) -> bool:
    """Whether `where` is known to hide what comes later, so that one need not say it again."""
    if isinstance(where, And):
        return hides_the_future(where.left) or hides_the_future(where.right)
    if isinstance(where, Or):
        return hides_the_future(where.left) and hides_the_future(where.right)
    return isinstance(where, (PowersOfTwo, Causal)) or (isinstance(where, Window) and where.causal)
