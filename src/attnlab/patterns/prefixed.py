"""A pattern of patches behind tokens that belong to none of them: class tokens, registers, a prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.patterns.base import Pattern
from attnlab.patterns.sequence import require_positive


@dataclass(frozen=True)
class Prefixed(Pattern):
    """The first `count` tokens see all and are seen by all; those after them see each other as `pattern` says.

    `Prefixed(Neighborhood(grid=(64, 64), kernel=7), 1)` is neighborhood attention in a ViT with a class token.
    """

    pattern: Pattern
    count: int

    def __post_init__(self) -> None:
        require_positive(self, "count")
        object.__setattr__(self, "per_batch", self.pattern.per_batch)
        object.__setattr__(self, "per_head", self.pattern.per_head)

    def check(self, nq: int, nk: int) -> None:
        if nk <= self.count:
            raise ValueError(f"Prefixed: there must be keys behind the first {self.count}, got {nk} in all")
        self.pattern.check(max(nq - self.count, 1), nk - self.count)

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        inner = self.pattern.allows(b, h, (q - self.count).clamp_min(0), (k - self.count).clamp_min(0))
        return inner | (q < self.count) | (k < self.count)

    def at(self, b: int, h: int) -> Pattern:
        return Prefixed(self.pattern.at(b, h), self.count)

    def query_tiles(self, nq: int) -> Tensor | None:
        if nq <= self.count:
            return None
        tiles = self.pattern.query_tiles(nq - self.count)
        if tiles is None:
            rest = torch.arange(self.count, -(-(nq - self.count) // 64) * 64 + self.count)
            tiles = rest.masked_fill(rest >= nq, -1).view(-1, 64)
        else:
            tiles = torch.where(tiles >= 0, tiles + self.count, -1)
        # Tiles of one size get lists of one length: those of the prefix, who see all, need sizes of their own.
        taken = set((tiles >= 0).sum(1).tolist())
        first = [torch.arange(a, b) for a, b in _cuts(self.count, taken)]
        width = max(tiles.shape[1], *map(len, first))
        rows = [F.pad(t, (0, width - len(t)), value=-1) for t in first]
        return torch.cat([torch.stack(rows), F.pad(tiles, (0, width - tiles.shape[1]), value=-1)])

    def tile_keys(self, tiles: Tensor, nk: int) -> Tensor | None:
        first = tiles.amin(1) < self.count
        every = torch.arange(nk, device=tiles.device)
        if first.all():
            return every.expand(len(tiles), nk)
        listed = self.pattern.tile_keys(tiles[~first] - self.count, nk - self.count)
        if listed is None:
            return None
        listed = torch.where(listed >= 0, listed + self.count, -1)
        listed = torch.cat([every[: self.count].expand(len(listed), -1), listed], 1)
        if not first.any():
            return listed
        keys = torch.full((len(tiles), nk), -1, device=tiles.device)
        keys[first] = every
        keys[~first, : listed.shape[1]] = listed
        return keys

    def __str__(self) -> str:
        return f"Prefixed({self.pattern}, {self.count})"


def _cuts(count: int, taken: set[int]) -> list[tuple[int, int]]:
    """0 … count − 1 as one or two ranges of sizes that are not taken, if there are such."""
    if count not in taken:
        return [(0, count)]
    for size in range(count // 2, 0, -1):
        if size not in taken and count - size not in taken:
            return [(0, size), (size, count)]
    return [(0, count)]
