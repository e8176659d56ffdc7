"""The geometric problems: labels that scipy and brute force agree with, and judges that cannot be fooled."""

from __future__ import annotations

import sys

import pytest
import torch

from attnlab.models.pointing.problems import (
    convex_hull,
    delaunay,
    is_simple,
    judge_hulls,
    judge_triangles,
    random_points,
)


def points(batch: int, n: int) -> torch.Tensor:
    return random_points(batch, n, torch.Generator().manual_seed(3)).double()


def answers(found: torch.Tensor, n: int) -> list[list[int]]:
    """Up to the end, which is there exactly once, with nothing behind it."""
    lists = []
    for row in found.tolist():
        cut = row.index(n)
        assert set(row[cut + 1 :]) <= {-1}
        lists.append(row[:cut])
    return lists


@pytest.mark.parametrize("n", [3, 9, 60])
def test_hulls_are_scipys_counter_clockwise_from_the_lowest_position(n):
    spatial = pytest.importorskip("scipy.spatial")
    sets = points(40, n)
    for p, hull in zip(sets, answers(convex_hull(sets), n), strict=True):
        corners = spatial.ConvexHull(p.numpy()).vertices.tolist()
        first = corners.index(min(corners))
        assert hull == corners[first:] + corners[:first]


def test_hulls_leave_out_points_between_corners_and_repeated_ones():
    grid = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0)).unsqueeze(0)
    assert convex_hull(grid).tolist() == [[0, 6, 8, 2, 9]]
    assert convex_hull(torch.cat((grid, grid), 1)).tolist() == [[0, 6, 8, 2, 18]]
    line = torch.arange(4.0).expand(2, 4).T.unsqueeze(0)
    assert convex_hull(line).tolist() == [[0, 3, 4]]


def test_triangulations_are_scipys_in_order_of_their_incentres():
    spatial = pytest.importorskip("scipy.spatial")
    sets = points(10, 8)
    for p, answer in zip(sets, answers(delaunay(sets), 8), strict=True):
        triangles = [tuple(answer[i : i + 3]) for i in range(0, len(answer), 3)]
        assert all(a < b < c for a, b, c in triangles)
        assert {tuple(sorted(t)) for t in spatial.Delaunay(p.numpy()).simplices.tolist()} == set(triangles)
        centres = []
        for t in triangles:
            a, b, c = p[list(t)]
            weights = torch.stack(((b - c).norm(), (c - a).norm(), (a - b).norm()))
            centres.append(tuple(((weights[:, None] * p[list(t)]).sum(0) / weights.sum()).tolist()))
        assert centres == sorted(centres)
        # Delaunay's own property: no circumcircle holds a fourth point.
        for t in triangles:
            rows = torch.cat((2 * p[list(t)], torch.ones(3, 1, dtype=p.dtype)), 1)
            solved = torch.linalg.solve(rows, (p[list(t)] ** 2).sum(1))
            radius = (p[t[0]] - solved[:2]).norm()
            others = [i for i in range(8) if i not in t]
            assert ((p[others] - solved[:2]).norm(dim=1) > radius - 1e-9).all()


def test_judged_hulls_may_begin_anywhere_but_not_cross():
    pytest.importorskip("scipy")
    square = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 0.4]]]).double()
    wanted = torch.tensor([[0, 1, 2, 3, 5]])
    assert torch.equal(convex_hull(square), wanted)
    assert judge_hulls(square, torch.tensor([[2, 3, 0, 1, 5]]), wanted) == (1.0, 0.0, 1.0)
    assert judge_hulls(square, torch.tensor([[0, 2, 1, 3, 5]]), wanted) == (0.0, 1.0, 0.0)
    assert judge_hulls(square, torch.tensor([[0, 1, 2, 5, -1]]), wanted) == (0.0, 0.0, 0.5)
    scores = judge_hulls(
        square.expand(2, -1, -1), torch.tensor([[0, 2, 1, 3, 5], [0, 1, 2, 3, 5]]), wanted.expand(2, -1)
    )
    assert scores == (0.5, 0.5, 1.0) and scores.fails
    assert not is_simple(square[0, :2]) and not is_simple(square[0, [0, 1, 0]])


def test_judged_triangles_count_in_any_order():
    wanted = torch.tensor([[0, 1, 2, 1, 2, 3, 4]])
    assert judge_triangles(torch.tensor([[3, 2, 1, 0, 2, 1, 4]]), wanted, 4) == (1.0, 1.0)
    assert judge_triangles(torch.tensor([[0, 1, 2, 0, 2, 3, 4]]), wanted, 4) == (0.0, 0.5)
    assert judge_triangles(torch.tensor([[0, 1, 2, 4, -1, -1, -1]]), wanted, 4) == (0.0, 0.5)


def test_bad_input_is_named(monkeypatch):
    with pytest.raises(ValueError, match="points must be"):
        convex_hull(torch.zeros(2, 5, 3))
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    with pytest.raises(ImportError, match=r"attnlab\[data\]"):
        delaunay(torch.zeros(1, 3, 2))
