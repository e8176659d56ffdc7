"""Gather the tokens of tiles, and sum what tiles return to the tokens they came from."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from attnlab.backends.tiles.tiling import Lists


def _rows(lists: Lists, batch: slice, tiles: slice, count: int, heads: int) -> Tensor:
    """Row numbers of the listed units: in (B·units) rows if the heads share their lists, else in (B·H·units)."""
    index = lists.index if lists.index.shape[0] == 1 else lists.index[batch]
    index = index[:, :, tiles]
    units, at = count // lists.unit, index.device
    first = torch.arange(batch.start, batch.stop, device=at)
    if index.shape[1] == 1:
        return (first[:, None, None] * units + index[:, 0]).flatten()
    head = first[:, None] * heads + torch.arange(heads, device=at)
    return (head[:, :, None, None] * units + index).transpose(1, 2).flatten()


class Tokens:
    """`x (B, H, N, D)` as a source of tiles. `repeat` folds that many query heads per key head into the rows."""

    def __init__(self, x: Tensor, repeat: int = 1) -> None:
        batch, heads, self.count, self.dim = x.shape
        self.heads, self.repeat = heads // repeat, repeat
        # (B, N, r, Hkv, D)
        self.x = x.view(batch, self.heads, repeat, self.count, self.dim).permute(0, 3, 2, 1, 4)

    @cached_property
    def _by_token(self) -> Tensor:
        return self.x.contiguous()

    @cached_property
    def _by_head(self) -> Tensor:
        return self.x.permute(0, 3, 1, 2, 4).contiguous()

    def take(self, lists: Lists, batch: slice, tiles: slice) -> Tensor:
        """The listed tokens, `(B'·T', Hkv, n·r, D)`: a view if they lie evenly in memory."""
        n, r, dim = lists.length, self.repeat, self.dim
        many = (batch.stop - batch.start, tiles.stop - tiles.start)
        if lists.run is not None:
            start, step = lists.run
            x = self.x[batch, start + tiles.start * step :]
            s = x.stride()
            x = x.as_strided((*many, self.heads, n, r, dim), (s[0], step * s[1], s[3], s[1], s[2], s[4]))
            return x.flatten(3, 4).flatten(0, 1)
        rows = _rows(lists, batch, tiles, self.count, self.heads)
        if lists.index.shape[1] == 1:
            x = self._by_token.view(-1, lists.unit, r, self.heads, dim).index_select(0, rows)
            return x.view(-1, n * r, self.heads, dim).transpose(1, 2)
        x = self._by_head.view(-1, lists.unit, r, dim).index_select(0, rows)
        return x.view(-1, self.heads, n * r, dim)


class Sums:
    """Where tiles put their results: `(B, H, N, D)`, one row written once (`put`) or each tile's part added (`add`)."""

    def __init__(self, like: Tokens, dim: int, dtype: torch.dtype, *, zero: bool = True) -> None:
        self.shape = (*like.x.shape[:-1], dim)
        self.dtype, self.device, self.zero = dtype, like.x.device, zero

    @cached_property
    def _by_token(self) -> Tensor:
        new = torch.zeros if self.zero else torch.empty
        return new(self.shape, dtype=self.dtype, device=self.device)

    @cached_property
    def _by_head(self) -> Tensor:
        batch, count, repeat, heads, dim = self.shape
        return torch.zeros((batch, heads, count, repeat, dim), dtype=self.dtype, device=self.device)

    def _window(self, batch: slice, first: int, step: int, tiles: int, n: int) -> Tensor:
        """The totals of tokens first + t·step + 0…n−1, seen in place as `(B', T, n, r, Hkv, D)`."""
        x = self._by_token[batch, first:]
        s = x.stride()
        return x.as_strided((len(x), tiles, n, *self.shape[2:]), (s[0], step * s[1], *s[1:]))

    def fill(self, value: float) -> None:
        """What rows that no tile writes shall hold."""
        self._by_token.fill_(value)

    def put(self, lists: Lists, batch: slice, tiles: slice, part: Tensor) -> None:
        """Write `part (B'·T', Hkv, n·r, D)`; no two tiles may list the same token."""
        part = part.transpose(1, 2)
        if lists.run is not None:
            start, step = lists.run
            window = self._window(batch, start + tiles.start * step, step, tiles.stop - tiles.start, lists.length)
            window.copy_(part.reshape(window.shape))
            return
        rows = _rows(lists, batch, tiles, self.shape[1], self.shape[3])
        part = part.reshape(len(rows), -1).to(self.dtype)
        self._by_token.view(-1, part.shape[1]).index_copy_(0, rows, part)

    def add(self, lists: Lists, batch: slice, tiles: slice, part: Tensor) -> None:
        """Add `part (B'·T', Hkv, n·r, D)` to the tokens that the tiles list."""
        n, many = lists.length, tiles.stop - tiles.start
        if lists.run is not None and (lists.run[1] == 0 or n <= 16 * lists.run[1]):
            start, step = lists.run
            part = part.transpose(1, 2).reshape(-1, many, n, *self.shape[2:])
            if step == 0:
                # All tiles list the same tokens.
                self._window(batch, start, 0, 1, n).add_(part.sum(1, keepdim=True))
                return
            # Tiles overlap, but their first `step` tokens do not, nor the next, and so on.
            for p in range(0, n, step):
                piece = part[:, :, p : p + step]
                self._window(batch, start + tiles.start * step + p, step, many, piece.shape[2]).add_(piece)
            return
        rows = _rows(lists, batch, tiles, self.shape[1], self.shape[3])
        if lists.index.shape[1] == 1:
            total, part = self._by_token, part.transpose(1, 2)
        else:
            total = self._by_head
        part = part.reshape(len(rows), -1).to(self.dtype)
        total.view(-1, part.shape[1]).index_add_(0, rows, part)

    def total(self) -> Tensor:
        """The sums, `(B, H, N, D)`."""
        by_head = self.__dict__.get("_by_head")
        if by_head is not None:
            by_head = by_head.permute(0, 1, 3, 2, 4)
            if "_by_token" not in self.__dict__:
                return by_head.flatten(1, 2)
        x = self._by_token.permute(0, 3, 2, 1, 4)
        return (x if by_head is None else x + by_head).flatten(1, 2)
