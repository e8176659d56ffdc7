"""A bias table inside the tiles: added to their scores, and given its gradient; its rows are kept from call to call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.backends.tiles.tiling import Group, kinds_of
from attnlab.problem import Lookup

# Masks (or gradients of masks) of up to this many elements are made for a whole group, not step by step.
_WHOLE = 2**23


@dataclass(frozen=True, eq=False)
class Rows:
    """Which row of a table each pair looks up: tile t the rows `rows[kinds[t]]`, since most tiles look alike.

    `kinds (T,)`, `rows (U, bq, bk)`; a key that is not seen has the row after the last.
    """

    kinds: Tensor
    rows: Tensor


def rows_of(group: Group, row: Callable[[Tensor, Tensor], Tensor], length: int) -> Rows:
    """The rows of a group's pairs in a table of `length` rows; kept with the group if `row` can be compared."""
    kept = group.__dict__.setdefault("_rows", {})
    if (row, length) in kept:
        return kept[row, length]
    queries, keys = group.queries.index[0, 0], group.keys.index[0, 0]
    found = row(queries[:, :, None], keys[:, None]).expand(len(queries), queries.shape[1], keys.shape[1])
    if group.seen is not None:
        found = torch.where(group.seen[0, 0], found, length)
    kinds = kinds_of(found.contiguous())
    first = torch.full((int(kinds.max()) + 1,), len(kinds), device=kinds.device)
    first.scatter_reduce_(0, kinds, torch.arange(len(kinds), device=kinds.device), "amin")
    rows = Rows(kinds, found[first])
    if type(row).__hash__ is not object.__hash__:
        kept[row, length] = rows
    return rows


class TileLookups:
    """The table of one call: masks for its steps, and the sum of the gradients that they return."""

    def __init__(self, bias: Lookup, kv_heads: int, dtype: torch.dtype) -> None:
        self.row, self.length = bias.row, len(bias.table)
        # (Hkv, r, rows + 1): the last row is that of a key which is not seen.
        self.table = F.pad(bias.table.detach().to(dtype).T, (0, 1), value=-math.inf).unflatten(0, (kv_heads, -1))
        self.hides = bool((bias.table == -math.inf).any())
        self.kv_heads, self.repeat = self.table.shape[:2]
        self._masks: dict[Group, Tensor] = {}
        self._grads: dict[Group, Tensor] = {}
        self._grad = torch.zeros_like(self.table, dtype=torch.promote_types(dtype, torch.float32))

    def mask(self, group: Group, batch: int, tiles: slice) -> Tensor:
        """`(B'·T' or 1, Hkv, bq·r, bk)` for some tiles of `batch` entries: the bias, −inf where a key is not seen."""
        rows = rows_of(group, self.row, self.length)
        if not self._fits(rows):
            mask = self._look_up(rows.rows.index_select(0, rows.kinds[tiles]))
        else:
            if group not in self._masks:
                self._masks[group] = self._look_up(rows.rows)
            mask = self._masks[group]
            if len(mask) == 1:
                return mask
            mask = mask.index_select(0, rows.kinds[tiles])
        return mask.repeat(batch, 1, 1, 1) if batch > 1 else mask

    def add(self, group: Group, batch: int, tiles: slice, grad: Tensor) -> None:
        """Take the gradient `(B'·T', Hkv, bq·r, bk)` of what `mask` gave."""
        rows = rows_of(group, self.row, self.length)
        grad = grad.unflatten(0, (batch, -1)).sum(0) if batch > 1 else grad
        if not self._fits(rows):
            self._scatter(rows.rows[rows.kinds[tiles]], grad)
            return
        if group not in self._grads:
            self._grads[group] = grad.new_zeros(len(rows.rows), *grad.shape[1:])
        self._grads[group].index_add_(0, rows.kinds[tiles], grad)

    def gradient(self) -> Tensor:
        """The gradient of the table, `(rows, H)`."""
        for group, grad in self._grads.items():
            self._scatter(rows_of(group, self.row, self.length).rows, grad)
        return self._grad[..., : self.length].flatten(0, 1).T

    def _fits(self, rows: Rows) -> bool:
        return rows.rows.numel() * self.kv_heads * self.repeat <= _WHOLE

    def _look_up(self, rows: Tensor) -> Tensor:
        found = torch.stack([row.index_select(0, rows.flatten()) for row in self.table.flatten(0, 1)])
        found = found.view(self.kv_heads, self.repeat, *rows.shape)
        return found.permute(2, 0, 3, 1, 4).flatten(2, 3).contiguous()

    def _scatter(self, rows: Tensor, grad: Tensor) -> None:
        grad = grad.unflatten(2, (-1, self.repeat)).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
        for total, one in zip(self._grad.flatten(0, 1), grad, strict=True):
            total.index_add_(0, rows.flatten(), one.to(total.dtype))
