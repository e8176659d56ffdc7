"""Gather the tokens of tiles, and sum what tiles return to the tokens they came from.

Inside, tokens are `(B, N, r, Hkv, D)`: r query heads that share a key head become rows of one tile.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from attnlab.backends.tiles.tiling import Group, Lists


def by_token(x: Tensor, repeat: int = 1) -> Tensor:
    """`x (B, H, N, D)` seen as `(B, N, r, Hkv, D)`."""
    return x.unflatten(1, (-1, repeat)).permute(0, 3, 2, 1, 4)


def by_head(x: Tensor) -> Tensor:
    """`x (B, N, r, Hkv, D)` as `(B, H, N, D)`: undoes `by_token`."""
    return x.permute(0, 3, 2, 1, 4).flatten(1, 2)


class Queries:
    """One value per query, `(B, N, r, Hkv, D)` in the tiling's order: read and written a step of tiles at a time."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def _at(self, group: Group, first: int, batch: slice, tiles: slice) -> Tensor:
        """The tokens of some tiles in place, `(B', T', n, r, Hkv, D)`."""
        n = group.queries.length
        return self.x[batch, first + tiles.start * n : first + tiles.stop * n].unflatten(1, (-1, n))

    def take(self, group: Group, first: int, batch: slice, tiles: slice) -> Tensor:
        """`(B'·T', Hkv, n·r, D)`, of the group whose queries begin at place `first` of the order."""
        return self._at(group, first, batch, tiles).flatten(2, 3).flatten(0, 1).transpose(1, 2)

    def put(self, group: Group, first: int, batch: slice, tiles: slice, part: Tensor) -> None:
        """Write `part (B'·T', Hkv, n·r, D)`."""
        place = self._at(group, first, batch, tiles)
        place.copy_(part.transpose(1, 2).reshape(place.shape))


class Keys:
    """`x (B, Hkv, N, D)` as a source of tiles."""

    def __init__(self, x: Tensor) -> None:
        self.heads, self.count, self.dim = x.shape[1:]
        self.x = x.transpose(1, 2)  # (B, N, Hkv, D)

    @cached_property
    def _by_token(self) -> Tensor:
        return self.x.contiguous()

    @cached_property
    def _by_head(self) -> Tensor:
        return self.x.transpose(1, 2).contiguous()

    def take(self, lists: Lists, batch: slice, tiles: slice, rows: Tensor | None) -> Tensor:
        """The listed tokens, `(B'·T', Hkv, n, D)`: a view if they lie evenly in memory."""
        n, dim = lists.length, self.dim
        if rows is None:
            return windows(self.x, lists, batch, tiles).flatten(0, 1).transpose(1, 2)
        if lists.shared:
            x = self._by_token.view(-1, lists.unit, self.heads, dim).index_select(0, rows)
            return x.view(-1, n, self.heads, dim).transpose(1, 2)
        x = self._by_head.view(-1, lists.unit, dim).index_select(0, rows)
        return x.view(-1, self.heads, n, dim)

    def rows(self, lists: Lists, batch: slice, tiles: slice) -> Tensor | None:
        """Which rows `take` gathers; None where it needs not."""
        if lists.run is not None:
            return None
        index = (lists.index if len(lists.index) == 1 else lists.index[batch])[:, :, tiles]
        if lists.shared and batch == slice(0, 1):
            return index.flatten()
        units, at = self.count // lists.unit, index.device
        first = torch.arange(batch.start, batch.stop, device=at)
        if lists.shared:
            return (first[:, None, None] * units + index[:, 0]).flatten()
        head = first[:, None] * self.heads + torch.arange(self.heads, device=at)
        return (head[:, :, None, None] * units + index).transpose(1, 2).flatten()


class Sums:
    """Sums over tiles for the tokens of `keys`, `(B, Hkv, N, D)`."""

    def __init__(self, keys: Keys, dtype: torch.dtype) -> None:
        self.keys, self.dtype = keys, dtype

    @cached_property
    def _by_token(self) -> Tensor:
        return torch.zeros(self.keys.x.shape, dtype=self.dtype, device=self.keys.x.device)

    @cached_property
    def _by_head(self) -> Tensor:
        return torch.zeros(self.keys.x.transpose(1, 2).shape, dtype=self.dtype, device=self.keys.x.device)

    def add(self, lists: Lists, batch: slice, tiles: slice, rows: Tensor | None, part: Tensor) -> None:
        """Add `part (B'·T', Hkv, n, D)` to the tokens that the tiles list."""
        if rows is None:
            self._add_run(lists, batch, tiles, part.transpose(1, 2))
            return
        part, total = (part.transpose(1, 2), self._by_token) if lists.shared else (part, self._by_head)
        part = part.reshape(len(rows), -1).to(self.dtype)
        total.view(-1, part.shape[1]).index_add_(0, rows, part)

    def _add_run(self, lists: Lists, batch: slice, tiles: slice, part: Tensor) -> None:
        part = part.unflatten(0, (batch.stop - batch.start, -1))
        start, step = lists.run or (0, 0)
        if step == 0:
            # All tiles list the same tokens.
            self._by_token[batch, start : start + lists.length] += part.sum(1)
            return
        # Tiles overlap, but their first `step` tokens do not, nor the next, and so on.
        for p in range(0, lists.length, step):
            piece = part[:, :, p : p + step]
            windows(self._by_token, lists, batch, tiles, p, piece.shape[2]).add_(piece)

    def total(self) -> Tensor:
        """The sums, `(B, Hkv, N, D)`."""
        by_head = self.__dict__.get("_by_head")
        if by_head is not None and "_by_token" not in self.__dict__:
            return by_head
        x = self._by_token.transpose(1, 2)
        return x if by_head is None else x + by_head


def windows(x: Tensor, lists: Lists, batch: slice, tiles: slice, skip: int = 0, count: int | None = None) -> Tensor:
    """Tokens skip … skip + count − 1 of evenly lying lists, seen in place in `x (B, N, …)`: `(B', T', count, …)`."""
    start, step = lists.run or (0, 0)
    x = x[batch, start + tiles.start * step + skip :]
    s = x.stride()
    shape = (len(x), tiles.stop - tiles.start, lists.length if count is None else count, *x.shape[2:])
    return x.as_strided(shape, (s[0], step * s[1], *s[1:]))
