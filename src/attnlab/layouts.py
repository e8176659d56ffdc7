"""Reorderings that put tokens which belong together side by side; each with its exact inverse. May import torch only.

tiles((56, 56), 7)             the 7 × 7 boxes of a grid, one after another
residues((56, 56), 4)          the 16 coarse grids that dilation 4 attends within
axial((56, 56), 0)             columns instead of rows
hilbert((48, 80))              a curve that stays close: any window of the sequence is a blob of the grid
by_score(brightness)           pixels from dark to bright
by_label(regions)              one region after another
shift((56, 56), 3)             Swin's cyclic shift

A layout is applied to a token axis and undone on it: `layout.invert(f(layout.apply(x)))`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """A reordering of N tokens: place i of the new order holds token `order[i]`.

    `order` is `(N,)`, or `(B, N)` with an order for each batch entry. `lengths` are the sizes of the groups that the
    reordering makes adjacent (boxes, residues, regions), where they are the same for the whole batch.
    """

    order: Tensor
    lengths: tuple[int, ...] = ()

    @cached_property
    def inverse(self) -> Layout:
        """The layout that undoes this one."""
        place = torch.arange(self.order.shape[-1], device=self.order.device).expand_as(self.order)
        return Layout(torch.empty_like(self.order).scatter_(-1, self.order, place))

    def apply(self, x: Tensor, dim: int = -2) -> Tensor:
        """The tokens on axis `dim` of `x`, in the new order. With an order per batch entry, axis 0 is the batch."""
        order = self.order.to(x.device)
        if x.shape[dim] != order.shape[-1]:
            raise ValueError(f"x must have {order.shape[-1]} tokens on axis {dim}, got shape {tuple(x.shape)}")
        if order.dim() == 1:
            return x.index_select(dim, order)
        if len(x) != len(order):
            raise ValueError(f"x must have the layout's batch size {len(order)}, got shape {tuple(x.shape)}")
        shape = [1] * x.dim()
        shape[0], shape[dim] = order.shape
        return x.gather(dim, order.view(shape).expand_as(x))

    def invert(self, x: Tensor, dim: int = -2) -> Tensor:
        """Undo `apply`."""
        return self.inverse.apply(x, dim)

    def then(self, other: Layout) -> Layout:
        """This reordering, then `other` of what it gives."""
        if self.order.dim() == other.order.dim() == 1:
            return Layout(self.order[other.order], other.lengths)
        first, second = torch.broadcast_tensors(self.order, other.order)
        return Layout(first.gather(-1, second), other.lengths)


def tiles(grid: Sequence[int], size: int | Sequence[int], shift: int | Sequence[int] = 0) -> Layout:
    """Boxes of `size` one after another, row-major between and within; those at the end may be smaller.

    With `shift` the cuts move on by that much on each axis, so the first boxes are smaller too.
    """
    sizes, shifts = _per_axis("size", size, grid, 1), _per_axis("shift", shift, grid, 0)
    places = [(torch.arange(n) - s % k + k) // k for n, k, s in zip(grid, sizes, shifts, strict=True)]
    return _grouped(_number([int(p.max()) + 1 for p in places], places))


def residues(grid: Sequence[int], step: int | Sequence[int]) -> Layout:
    """The coarse grids of every `step`-th token, one after another; ragged where `step` does not divide an axis."""
    steps = _per_axis("step", step, grid, 1)
    return _grouped(_number(steps, [torch.arange(n) % s for n, s in zip(grid, steps, strict=True)]))


def axial(grid: Sequence[int], axis: int) -> Layout:
    """The lines along `axis` one after another: a transpose that makes `axis` the fastest."""
    if not -len(grid) <= axis < len(grid):
        raise ValueError(f"axis must be one of the {len(grid)} axes of the grid, got {axis}")
    order = torch.arange(math.prod(grid)).view(*grid).movedim(axis, -1).flatten()
    return Layout(order, (grid[axis],) * (len(order) // grid[axis]))


def shift(grid: Sequence[int], by: int | Sequence[int]) -> Layout:
    """Every axis moved on cyclically by `by`: token (i, j) comes to (i + by, j + by)."""
    steps = _per_axis("by", by, grid, None)
    order = torch.arange(math.prod(grid)).view(*grid).roll(steps, tuple(range(len(grid)))).flatten()
    return Layout(order)


def morton(grid: Sequence[int]) -> Layout:
    """Z-order: coordinates' bits interleaved, for any grid (places outside it are skipped)."""
    _check_grid(grid)
    bits = max(1, (max(grid) - 1).bit_length())
    key = torch.zeros(tuple(grid), dtype=torch.long)
    for axis, length in enumerate(grid):
        at = torch.arange(length).view([-1 if a == axis else 1 for a in range(len(grid))])
        for bit in range(bits):
            key = key | ((at >> bit) & 1) << (bit * len(grid) + len(grid) - 1 - axis)
    return Layout(key.flatten().argsort())


def hilbert(grid: Sequence[int]) -> Layout:
    """The generalised Hilbert curve over any H × W: neighbours in the sequence are neighbours in the grid.

    A step of the curve goes to an adjacent token, if need be diagonally (once, where both sides of a part are odd).
    """
    _check_grid(grid)
    if len(grid) != 2:
        raise ValueError(f"grid must have two axes for a Hilbert curve, got {tuple(grid)}")
    height, width = grid
    path: list[int] = []
    # Parts still to walk, the next one last: start (row, column), long side, short side, each a signed vector.
    parts = [(0, 0, (0, width), (height, 0)) if width >= height else (0, 0, (height, 0), (0, width))]
    while parts:
        row, column, a, b = parts.pop()
        long, short = abs(sum(a)), abs(sum(b))
        along, across = _unit(a), _unit(b)
        if short == 1 or long == 1:
            step, count = (along, long) if short == 1 else (across, short)
            path += [(row + step[0] * i) * width + column + step[1] * i for i in range(count)]
            continue
        half_a, half_b = _half(a, along), _half(b, across)
        if 2 * long > 3 * short:
            if sum(map(abs, half_a)) % 2 and long > 2:
                half_a = (half_a[0] + along[0], half_a[1] + along[1])
            rest = (a[0] - half_a[0], a[1] - half_a[1])
            parts += [(row + half_a[0], column + half_a[1], rest, b), (row, column, half_a, b)]
            continue
        if sum(map(abs, half_b)) % 2 and short > 2:
            half_b = (half_b[0] + across[0], half_b[1] + across[1])
        rest_a, rest_b = (a[0] - half_a[0], a[1] - half_a[1]), (b[0] - half_b[0], b[1] - half_b[1])
        corner_row = row + a[0] - along[0] + half_b[0] - across[0]
        corner_column = column + a[1] - along[1] + half_b[1] - across[1]
        parts += [
            (corner_row, corner_column, (-half_b[0], -half_b[1]), (-rest_a[0], -rest_a[1])),
            (row + half_b[0], column + half_b[1], a, rest_b),
            (row, column, half_b, half_a),
        ]
    return Layout(torch.tensor(path))


def by_score(score: Tensor, descending: bool = False) -> Layout:
    """Tokens by their `score` `(N,)` or `(B, N)`, equal ones in their old order."""
    if score.dim() not in (1, 2):
        raise ValueError(f"score must be (N,) or (B, N), got {tuple(score.shape)}")
    return Layout(score.argsort(dim=-1, stable=True, descending=descending))


def by_label(labels: Tensor) -> Layout:
    """Tokens grouped by their label `(N,)` or `(B, N)`, groups by ascending label, within a group in the old order."""
    layout = by_score(labels)
    return _grouped(labels) if labels.dim() == 1 else layout


def _grouped(labels: Tensor) -> Layout:
    lengths = labels.unique(return_counts=True)[1].tolist()
    return Layout(labels.argsort(stable=True), tuple(lengths))


def _number(counts: Sequence[int], places: Sequence[Tensor]) -> Tensor:
    """One number for each token of the grid from its place on every axis, row-major."""
    number = torch.zeros((), dtype=torch.long)
    for count, place in zip(counts, places, strict=True):
        number = number[..., None] * count + place
    return number.flatten()


def _unit(v: tuple[int, int]) -> tuple[int, int]:
    return tuple((x > 0) - (x < 0) for x in v)  # type: ignore[return-value]


def _half(v: tuple[int, int], unit: tuple[int, int]) -> tuple[int, int]:
    half = abs(sum(v)) // 2
    return unit[0] * half, unit[1] * half


def _check_grid(grid: Sequence[int]) -> None:
    if not grid or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in grid):
        raise ValueError(f"grid must be integers of at least 1, got {tuple(grid)}")


def _per_axis(name: str, value: int | Sequence[int], grid: Sequence[int], least: int | None) -> tuple[int, ...]:
    _check_grid(grid)
    values = tuple(value) if isinstance(value, Sequence) else (value,) * len(grid)
    if len(values) != len(grid):
        raise ValueError(f"{name} must be one integer or one for each of the {len(grid)} axes, got {values}")
    if least is not None and min(values) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return values
