"""Groups of adjacent tokens that see each other alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnlab.patterns.base import Pattern, key_range
from attnlab.patterns.sequence import require_positive


@dataclass(frozen=True)
class Groups(Pattern):
    """Each query sees the keys of its own group of `size` adjacent tokens, on both sides.

    With `shift`, borders lie so many tokens earlier and the first group is shorter; in a ring of `ring` tokens it goes
    on with the last ones. `Groups(256) & Causal()` is block-local attention; with half the heads shifted by half a
    group it is S²-Attn (arXiv 2309.12307).
    """

    size: int
    shift: int = 0
    ring: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, "size", *(() if self.ring is None else ("ring",)))
        if not 0 <= self.shift < self.size:
            raise ValueError(f"Groups: shift must be in [0, size = {self.size}), got {self.shift}")
        if self.ring is not None and self.ring % self.size:
            raise ValueError(f"Groups: ring must be a multiple of size = {self.size}, got {self.ring}")

    def check(self, nq: int, nk: int) -> None:
        if self.ring is not None and (nk != self.ring or nq > nk):
            raise ValueError(f"Groups: a ring of {self.ring} tokens does not fit {nq} queries and {nk} keys")

    def _group(self, at: Tensor) -> Tensor:
        at = at + self.shift
        return (at if self.ring is None else at % self.ring) // self.size

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self._group(q) == self._group(k)

    def tile_keys(self, tiles: Tensor, nk: int) -> Tensor | None:
        if self.ring is not None and self.shift:
            return None
        begin = (tiles.amin(1) + self.shift) // self.size * self.size - self.shift
        end = ((tiles.amax(1) + self.shift) // self.size + 1) * self.size - self.shift - 1
        return key_range(begin, end, nk)
