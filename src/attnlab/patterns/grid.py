"""Patterns on a grid of tokens with any number of axes: on each axis, a query accepts an interval of coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.patterns.base import Pattern
from attnlab.patterns.boxes import box_keys, box_tiles


def per_axis(name: str, value: int | Sequence[int], axes: int, least: int = 1) -> tuple[int, ...]:
    """`value` as one integer of at least `least` for each axis."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f"{name} must be one integer or one for each of the {axes} axes of the grid, got {values}")
    if any(isinstance(x, bool) or not isinstance(x, int) or x < least for x in values):
        raise ValueError(f"{name} must be integers of at least {least}, got {value!r}")
    return values


@dataclass(frozen=True)
class GridPattern(Pattern):
    """Tokens lie on a grid, row-major; a query sees the keys whose every coordinate it accepts.

    A subclass says for each axis which interval of coordinates that is (`interval`), taken every `step(axis)`-th.
    """

    grid: tuple[int, ...]

    def __post_init__(self) -> None:
        grid = (self.grid,) if isinstance(self.grid, int) else tuple(self.grid)
        if not grid:
            raise ValueError("grid must have at least one axis, got ()")
        object.__setattr__(self, "grid", per_axis("grid", grid, len(grid)))

    def interval(self, axis: int, i: Tensor) -> tuple[Tensor, Tensor]:
        """First and last coordinate that a query at coordinate `i` accepts on `axis`."""
        raise NotImplementedError

    def step(self, axis: int) -> int:
        """Of the interval, only coordinates that differ from the query's by a multiple of this are accepted."""
        return 1

    def check(self, nq: int, nk: int) -> None:
        total = math.prod(self.grid)
        if nk != total or nq > total:
            shape = " × ".join(map(str, self.grid))
            raise ValueError(f"grid {shape} holds {total} tokens, but there are {nq} queries and {nk} keys")

    def coordinates(self, tokens: Tensor) -> list[Tensor]:
        """The coordinate of each token on each axis."""
        found: list[Tensor] = []
        for length in reversed(self.grid[1:]):
            found.append(tokens % length)
            tokens = tokens // length
        return [tokens, *reversed(found)]

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (q == q) & (k == k)
        for axis, (i, j) in enumerate(zip(self.coordinates(q), self.coordinates(k), strict=True)):
            first, last = self.interval(axis, i)
            seen = seen & (j >= first) & (j <= last)
            if self.step(axis) > 1:
                seen = seen & (i % self.step(axis) == j % self.step(axis))
        return seen

    def query_tiles(self, nq: int) -> Tensor:
        axes = range(len(self.grid))
        every = [torch.arange(n) for n in self.grid]
        tiles = box_tiles(self.grid, [self.interval(a, every[a]) for a in axes], [self.step(a) for a in axes])
        return tiles.masked_fill(tiles >= nq, -1)

    def tile_keys(self, tiles: Tensor, nk: int) -> Tensor:
        axes = range(len(self.grid))
        at = self.coordinates(tiles)
        return box_keys(self.grid, at, [self.interval(a, at[a]) for a in axes], [self.step(a) for a in axes])


@dataclass(frozen=True)
class Neighborhood(GridPattern):
    """Each query sees the `kernel` nearest keys on every axis; at the border the window moves inward, never shrinks.

    On an axis of length L, with dilation d, only keys of the query's residue modulo d count; p = ⌊i/d⌋ is its place
    among the n of them. Queries of one ⌊p/stride⌋ share a window, that of the leader m = min(⌊p/s⌋·s + ⌊s/2⌋, n − 1):

        places start … start + kernel − 1,    start = clamp(m − ⌊kernel/2⌋, 0, n − kernel)

    On a causal axis the leader is the last of its group, and the window max(m − kernel + 1, 0) … p. Each of `kernel`,
    `dilation`, `stride` and `causal` is one value, or one for each axis. `stride = kernel` is blocked attention,
    `kernel = grid` full attention. NATTEN's rule: arXiv 2204.07143, 2209.15001 (dilation), 2504.16922 (stride).
    """

    kernel: int | tuple[int, ...]
    dilation: int | tuple[int, ...] = 1
    stride: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        axes = len(self.grid)
        for name in ("kernel", "dilation", "stride"):
            object.__setattr__(self, name, per_axis(name, getattr(self, name), axes))
        causal = tuple(self.causal) if isinstance(self.causal, Sequence) else (self.causal,) * axes
        if len(causal) != axes or any(not isinstance(c, bool) for c in causal):
            raise ValueError(f"causal must be one bool or one for each of the {axes} axes, got {self.causal!r}")
        object.__setattr__(self, "causal", causal)
        for axis, (length, kernel, dilation, stride, _) in enumerate(self._axes):
            if kernel > length:
                raise ValueError(f"kernel must fit the grid, got {kernel} on axis {axis} of length {length}")
            if kernel * dilation > length:
                raise ValueError(
                    f"kernel · dilation must fit the grid, got {kernel} · {dilation} on axis {axis} of length {length}"
                )
            if stride > kernel:
                raise ValueError(f"stride must be at most kernel, got {stride} and {kernel} on axis {axis}")

    @property
    def _axes(self) -> list[tuple[int, int, int, int, bool]]:
        return list(zip(self.grid, self.kernel, self.dilation, self.stride, self.causal, strict=True))  # type: ignore

    def step(self, axis: int) -> int:
        return self._axes[axis][2]

    def interval(self, axis: int, i: Tensor) -> tuple[Tensor, Tensor]:
        length, kernel, dilation, stride, causal = self._axes[axis]
        residue, place = i % dilation, i // dilation
        count = (length - residue + dilation - 1) // dilation
        group = place // stride * stride
        if causal:
            leader = torch.minimum(group + stride - 1, count - 1)
            start, end = (leader - kernel + 1).clamp_min(0), place
        else:
            leader = torch.minimum(group + stride // 2, count - 1)
            start = torch.minimum((leader - kernel // 2).clamp_min(0), count - kernel)
            end = start + kernel - 1
        return start * dilation + residue, end * dilation + residue


@dataclass(frozen=True)
class Blocks(GridPattern):
    """Each query sees the keys of its own block: the grid is cut into blocks of `size` coordinates per axis.

    With `shift` the cuts move on by that much, and blocks do not join across the border: Swin's shifted windows with
    their mask (arXiv 2103.14030). The last block of an axis is smaller if `size` does not divide it.
    """

    size: int | tuple[int, ...]
    shift: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "size", per_axis("size", self.size, len(self.grid)))
        object.__setattr__(self, "shift", per_axis("shift", self.shift, len(self.grid), least=0))

    def interval(self, axis: int, i: Tensor) -> tuple[Tensor, Tensor]:
        size, shift = self.size[axis], self.shift[axis] % self.size[axis]  # type: ignore[index]
        start = (i - shift + size) // size * size + shift - size
        return start.clamp_min(0), (start + size - 1).clamp_max(self.grid[axis] - 1)


@dataclass(frozen=True)
class Halo(GridPattern):
    """Each query sees its own block and `halo` more coordinates on either side of it, as far as the grid goes.

    Blocked local attention with halos (HaloNet, arXiv 2103.12731).
    """

    block: int | tuple[int, ...]
    halo: int | tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "block", per_axis("block", self.block, len(self.grid)))
        object.__setattr__(self, "halo", per_axis("halo", self.halo, len(self.grid), least=0))

    def interval(self, axis: int, i: Tensor) -> tuple[Tensor, Tensor]:
        block, halo = self.block[axis], self.halo[axis]  # type: ignore[index]
        start = i // block * block
        return (start - halo).clamp_min(0), (start + block - 1 + halo).clamp_max(self.grid[axis] - 1)


@dataclass(frozen=True)
class Around(GridPattern):
    """Each query sees the window that a convolution centred on it sees, as far as the grid goes: less at the border.

    `kernel` (odd) and `dilation` are one value, or one for each axis. `Neighborhood` moves its window inward instead.
    """

    kernel: int | tuple[int, ...]
    dilation: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "kernel", per_axis("kernel", self.kernel, len(self.grid)))
        object.__setattr__(self, "dilation", per_axis("dilation", self.dilation, len(self.grid)))
        if any(k % 2 == 0 for k in self.kernel):  # type: ignore[union-attr]
            raise ValueError(f"kernel must be odd on every axis, got {self.kernel}")

    def step(self, axis: int) -> int:
        return self.dilation[axis]  # type: ignore[index]

    def interval(self, axis: int, i: Tensor) -> tuple[Tensor, Tensor]:
        reach, step = self.kernel[axis] // 2, self.step(axis)  # type: ignore[index]
        before, after = i // step, (self.grid[axis] - 1 - i) // step
        return i - step * before.clamp_max(reach), i + step * after.clamp_max(reach)


@dataclass(frozen=True)
class Axial(GridPattern):
    """Each query sees the keys on its own line along `axis` (axial attention, arXiv 1912.12180)."""

    axis: int

    def __post_init__(self) -> None:
        super().__post_init__()
        axes = len(self.grid)
        if isinstance(self.axis, bool) or not isinstance(self.axis, int) or not -axes <= self.axis < axes:
            raise ValueError(f"axis must be one of the {axes} axes of the grid, got {self.axis!r}")
        object.__setattr__(self, "axis", self.axis % axes)

    def interval(self, axis: int, i: Tensor) -> tuple[Tensor, Tensor]:
        if axis != self.axis:
            return i, i
        return torch.zeros_like(i), torch.full_like(i, self.grid[axis] - 1)


@dataclass(frozen=True)
class SoFar(Pattern):
    """A pattern of a grid while its last tokens are still to come: queries and keys are the grid's first tokens."""

    pattern: GridPattern

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.pattern.allows(b, h, q, k)

    def check(self, nq: int, nk: int) -> None:
        self.pattern.check(nq, max(nk, math.prod(self.pattern.grid)))
