"""Tiles of a grid, and the box of keys that each needs, when a query accepts an interval of coordinates per axis."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Interval = tuple[Tensor, Tensor]

# What gathering a key, starting a tile, and another size of tile cost, in (query, key) pairs: roughly as measured.
_KEY, _START, _SIZE = 40, 1000, 20_000


def box_tiles(grid: Sequence[int], intervals: Sequence[Interval], steps: Sequence[int]) -> Tensor:
    """Cut the grid into boxes of queries (within one residue of each step) that share many keys.

    Returns the tokens of each box, `(T, b)` padded with −1. The box size is the cheapest of a few per axis: small boxes
    gather the same keys over and over, large ones compute pairs in vain.
    """
    choices = []
    for length, interval, step in zip(grid, intervals, steps, strict=True):
        found = {}
        for size in {*range(1, 9), 10, 12, 14, 16, 24, 32, 64, 128, length}:
            if size <= length:
                tiles = _cut(length, interval, step, size)
                found[tuple(map(len, tiles))] = tiles
        choices.append([(_weigh(tiles, interval, step), tiles) for tiles in found.values()])
    best = min(itertools.product(*choices), key=lambda choice: _cost([weights for weights, _ in choice]))
    flat = torch.zeros(1, 1, dtype=torch.long)
    for (_, tiles), length in zip(best, grid, strict=True):
        widest = max(map(len, tiles))
        axis = torch.stack([torch.nn.functional.pad(t, (0, widest - len(t)), value=-1) for t in tiles])
        joined = flat[:, None, :, None] * length + axis[None, :, None, :]
        joined = joined.masked_fill((flat[:, None, :, None] < 0) | (axis[None, :, None, :] < 0), -1)
        flat = joined.flatten(2).flatten(0, 1)
    return flat


def _cut(length: int, interval: Interval, step: int, size: int) -> list[Tensor]:
    """The coordinates of one axis in tiles of about `size`, each within one residue modulo `step`."""
    tiles: list[Tensor] = []
    for residue in range(min(step, length)):
        places = torch.arange(residue, length, step)
        first, last = (x[places] for x in interval)
        change = (first[1:] != first[:-1]) | (last[1:] != last[:-1])
        atoms = [0, *(change.nonzero()[:, 0] + 1).tolist(), len(places)]
        if len(atoms) - 1 > len(places) // 2:
            # Windows slide: tiles of nearly equal size.
            many = -(-len(places) // size)
            cuts = [round(i * len(places) / many) for i in range(many + 1)]
        else:
            # Windows jump: never cut what shares a window, unless it is longer than a tile.
            cuts = [0]
            for a, b in itertools.pairwise(atoms):
                many = -(-(b - a) // size)
                if many > 1:
                    cuts += [a, *(a + round(i * (b - a) / many) for i in range(1, many + 1))]
                elif b - cuts[-1] > size:
                    cuts.append(a)
            cuts = sorted({*cuts, len(places)})
        tiles += [places[a:b] for a, b in itertools.pairwise(cuts)]
    return tiles


def _weigh(tiles: list[Tensor], interval: Interval, step: int) -> tuple[int, int, int, int]:
    """How many tiles, keys of tiles, pairs and sizes of tiles an axis has."""
    spans = [int(interval[1][t].max() - interval[0][t].min()) // step + 1 for t in tiles]
    pairs = sum(s * len(t) for s, t in zip(spans, tiles, strict=True))
    return len(tiles), sum(spans), pairs, len({len(t) for t in tiles})


def _cost(axes: list[tuple[int, int, int, int]]) -> int:
    tiles, keys, pairs, sizes = (math.prod(axis[i] for axis in axes) for i in range(4))
    return pairs + _KEY * keys + _START * tiles + _SIZE * sizes


def box_keys(grid: Sequence[int], at: Sequence[Tensor], intervals: Sequence[Interval], steps: Sequence[int]) -> Tensor:
    """The keys that tiles of queries may see: for each tile the box around its queries' intervals.

    `at` and `intervals` hold each axis' coordinates and intervals of the queries, `(T, b)`. Returns `(T, n)` tokens,
    ascending, padded with −1.
    """
    flat = torch.zeros(len(at[0]), 1, dtype=torch.long, device=at[0].device)
    for length, here, (first, last), step in zip(grid, at, intervals, steps, strict=True):
        if step > 1 and (here % step != here[:, :1] % step).any():
            step = 1
        low, high = first.amin(1), last.amax(1)
        axis = low[:, None] + step * torch.arange(int(((high - low) // step).max()) + 1, device=low.device)
        axis = axis.masked_fill(axis > high[:, None], -1)
        joined = flat[:, :, None] * length + axis[:, None, :]
        flat = joined.masked_fill((flat[:, :, None] < 0) | (axis[:, None, :] < 0), -1).flatten(1)
    return flat
