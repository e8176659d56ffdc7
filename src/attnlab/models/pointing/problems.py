"""Geometric problems with sequences of positions as answers, solved exactly, and how answers are judged.

Points are uniform in the unit square. Answers are (B, T): positions from 0, then N for the end, then −1. scipy, of
the `data` extra, finds triangulations.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


def _spatial(purpose: str) -> Any:
    try:
        return importlib.import_module("scipy.spatial")
    except ImportError as error:
        raise ImportError(f"{purpose} needs the package 'scipy': pip install 'attnlab[data]'") from error


def random_points(batch: int, n: int, generator: torch.Generator | None = None) -> Tensor:
    """`batch` sets of `n` points, (batch, n, 2)."""
    return torch.rand(batch, n, 2, generator=generator)


def _check(points: Tensor, least: int) -> None:
    if points.ndim != 3 or points.shape[-1] != 2 or points.shape[1] < least:
        raise ValueError(f"points must be (B, N, 2) with N ≥ {least}, got {tuple(points.shape)}")


def solve_each(points: Tensor, least: int, solve: Callable[[np.ndarray], list[int]]) -> Tensor:
    """`solve` for each set of at least `least` points, as answers."""
    _check(points, least)
    n = points.shape[1]
    answers = [torch.tensor([*solve(p), n]) for p in points.detach().cpu().double().numpy()]
    return torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-1).to(points.device)


def convex_hull(points: Tensor) -> Tensor:
    """Each set's convex hull, counter-clockwise from the corner with the lowest position.

    Jarvis's march through all sets at once, by the smallest turn at each corner. Cost: N per corner.
    """
    _check(points, 3)
    p, n, rows = points.detach().double(), points.shape[1], torch.arange(len(points), device=points.device)
    x, y = p.unbind(-1)
    start = at = x.masked_fill(y > y.amin(1, keepdim=True), torch.inf).argmin(1)
    way = p.new_tensor([1.0, 0.0]).expand(len(p), 1, 2)
    corners, over = torch.full_like(rows.unsqueeze(1).expand(-1, n), n), torch.zeros_like(at, dtype=torch.bool)
    for step in range(n):
        corners[:, step] = at.masked_fill(over, n)
        ways = p - p[rows, at].unsqueeze(1)
        far = ways.square().sum(-1)
        turns = torch.atan2(way[..., 0] * ways[..., 1] - way[..., 1] * ways[..., 0], (way * ways).sum(-1))
        # None turns right, but straight back may look like it.
        turns = turns.where(turns > -1, turns + 2 * torch.pi).masked_fill(far == 0, torch.inf)
        # Of several in one line, the farthest.
        at = far.masked_fill(turns > turns.amin(1, keepdim=True) + 1e-12, -1.0).argmax(1)
        way = ways[rows, at].unsqueeze(1)
        over = over | (at == start)
        if over.all():
            break
    sizes = (corners < n).sum(1, keepdim=True)
    places = torch.arange(n + 1, device=points.device)
    turned = corners.gather(1, (corners.argmin(1, keepdim=True) + places) % sizes)
    answers = turned.masked_fill(places == sizes, n).masked_fill(places > sizes, -1)
    return answers[:, : int(sizes.max()) + 1]


def delaunay(points: Tensor) -> Tensor:
    """Each set's Delaunay triangles, by their incentres' x, then y; the three positions of each increase."""
    spatial = _spatial("delaunay")

    def solve(p: np.ndarray) -> list[int]:
        triangles = np.sort(spatial.Delaunay(p).simplices, 1)
        corners = p[triangles]
        # Each corner weighs as much as the side that it faces.
        sides = np.linalg.norm(np.roll(corners, -1, 1) - np.roll(corners, 1, 1), axis=-1, keepdims=True)
        centres = (corners * sides).sum(1) / sides.sum(1)
        return triangles[np.lexsort((centres[:, 1], centres[:, 0]))].flatten().tolist()

    return solve_each(points, 3, solve)


class HullScores(NamedTuple):
    """Over all sets: the share of hulls found exactly, of polygons that cross themselves, and of area covered by the
    others."""

    accuracy: float
    crossing: float
    area: float

    @property
    def fails(self) -> bool:
        """Whether more than 1 % of the answers are no simple polygons: the area then says nothing."""
        return self.crossing > 0.01


def judge_hulls(points: Tensor, found: Tensor, wanted: Tensor) -> HullScores:
    """Compares polygons: the same corners in the same cyclic order are the same hull, wherever it begins."""
    right, crossing, covered = 0, 0, []
    for p, mine, true in zip(points.double().cpu(), found, wanted, strict=True):
        ours, theirs = _positions(mine, len(p)), _positions(true, len(p))
        right += _rotated(ours) == _rotated(theirs)
        if not is_simple(p[ours]):
            crossing += 1
            continue
        covered.append(float(_area(p[ours]) / _area(p[theirs])))
    return HullScores(right / len(points), crossing / len(points), sum(covered) / max(len(covered), 1))


def _positions(answer: Tensor, n: int) -> list[int]:
    return [i for i in answer.tolist() if 0 <= i < n]


def _rotated(corners: list[int]) -> list[int]:
    first = corners.index(min(corners)) if corners else 0
    return corners[first:] + corners[:first]


def _area(polygon: Tensor) -> Tensor:
    x, y = polygon.unbind(-1)
    return (x * y.roll(-1) - y * x.roll(-1)).sum().abs() / 2


def _cross(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Above 0 where a, b, c turn left."""
    return (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (c[..., 0] - a[..., 0])


def is_simple(polygon: Tensor) -> bool:
    """Whether a polygon (N, 2) has three corners or more, none twice, and no two sides that cross."""
    n = len(polygon)
    if n < 3 or len(polygon.unique(dim=0)) < n:
        return False
    a, b = polygon, polygon.roll(-1, 0)
    turns = [_cross(a.unsqueeze(1), b.unsqueeze(1), end.unsqueeze(0)) for end in (a, b)]
    parted = turns[0] * turns[1] < 0
    return not bool((parted & parted.T).any())


def judge_triangles(found: Tensor, wanted: Tensor, n: int) -> tuple[float, float]:
    """(accuracy, coverage): the share of triangulations found whole, in any order, and of triangles found."""
    right, coverage = 0, 0.0
    for mine, true in zip(found, wanted, strict=True):
        ours, theirs = _triangles(mine, n), _triangles(true, n)
        right += ours == theirs and len(_positions(mine, n)) == len(_positions(true, n))
        coverage += len(ours & theirs) / len(theirs)
    return right / len(found), coverage / len(found)


def _triangles(answer: Tensor, n: int) -> set[tuple[int, ...]]:
    positions = _positions(answer, n)
    return {tuple(sorted(positions[i : i + 3])) for i in range(0, len(positions) - 2, 3)}
