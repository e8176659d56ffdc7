"""Round trips: the shortest by brute force, approximations within their guarantees and as long as published."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch

from attnlab.models.pointing.problems import random_points
from attnlab.models.pointing.tours import (
    _christofides,
    _greedy,
    christofides_tour,
    greedy_tour,
    improved_tour,
    shortest_tour,
    tour_length,
)

SOLVERS = [shortest_tour, greedy_tour, improved_tour, christofides_tour]
NAMES = [solver.__name__ for solver in SOLVERS]


def points(batch: int, n: int) -> torch.Tensor:
    return random_points(batch, n, torch.Generator().manual_seed(3)).double()


def distances(p: torch.Tensor) -> np.ndarray:
    return torch.cdist(p, p).numpy()


def test_tours_are_the_shortest_of_all():
    sets = points(6, 7)
    every = torch.tensor([[0, *t] for t in itertools.permutations(range(1, 7))])
    for p, tour in zip(sets, shortest_tour(sets), strict=True):
        lengths = tour_length(p.expand(len(every), -1, -1), every)
        torch.testing.assert_close(tour_length(p.unsqueeze(0), tour.unsqueeze(0))[0], lengths.min())


@pytest.mark.parametrize("solve", SOLVERS, ids=NAMES)
@pytest.mark.parametrize("n", [2, 3, 4, 9])
def test_tours_visit_each_point_once_from_the_first_towards_the_lower(solve, n):
    pytest.importorskip("networkx")
    tours = solve(points(8, n))
    assert tours.shape == (8, n + 1) and (tours[:, 0] == 0).all() and (tours[:, n] == n).all()
    assert torch.equal(tours[:, :n].sort(1).values, torch.arange(n).expand(8, -1))
    assert (tours[:, 1] <= tours[:, n - 1]).all()


# Table 2 of arXiv 1506.03134; its points are other draws of the same kind.
@pytest.mark.parametrize(
    ("solve", "n", "count", "published"),
    [(shortest_tour, 5, 600, 2.12), (shortest_tour, 10, 100, 2.87), (greedy_tour, 5, 600, 2.18),
     (greedy_tour, 10, 300, 3.07), (greedy_tour, 20, 300, 4.24), (improved_tour, 10, 200, 2.87),
     (improved_tour, 20, 60, 3.86), (christofides_tour, 10, 200, 2.87), (christofides_tour, 20, 100, 3.85)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)  # fmt: skip
def test_mean_tours_are_as_long_as_published(solve, n, count, published):
    pytest.importorskip("networkx")
    sets = points(count, n)
    assert tour_length(sets, solve(sets)).mean().item() == pytest.approx(published, abs=0.08)


def test_no_approximation_beats_the_shortest():
    pytest.importorskip("networkx")
    sets = points(20, 9)
    shortest = tour_length(sets, shortest_tour(sets))
    for solve in SOLVERS[1:]:
        assert (tour_length(sets, solve(sets)) >= shortest - 1e-12).all()


def test_greedy_edges_are_the_shortest_that_make_a_path():
    for p in points(20, 8):
        far, groups, degree, taken = distances(p), [{i} for i in range(8)], [0] * 8, set()
        for a, b in sorted(itertools.combinations(range(8), 2), key=lambda e: far[e]):
            mine, theirs = (next(g for g in groups if x in g) for x in (a, b))
            if degree[a] < 2 and degree[b] < 2 and mine is not theirs:
                groups = [g for g in groups if g not in (mine, theirs)] + [mine | theirs]
                degree[a], degree[b] = degree[a] + 1, degree[b] + 1
                taken.add((a, b))
        assert {tuple(sorted(e)) for e in itertools.pairwise(_greedy(far))} == taken


def test_christofides_is_within_one_and_a_half_of_the_shortest_before_it_is_improved():
    pytest.importorskip("networkx")
    sets = points(30, 9)
    raw = torch.stack([torch.tensor(_christofides(distances(p))) for p in sets])
    assert (tour_length(sets, raw) <= 1.5 * tour_length(sets, shortest_tour(sets))).all()


@pytest.mark.parametrize("solve", [improved_tour, christofides_tour], ids=["improved_tour", "christofides_tour"])
def test_no_stretch_turned_around_makes_an_improved_tour_shorter(solve):
    pytest.importorskip("networkx")
    sets = points(3, 14)
    for p, tour in zip(sets, solve(sets)[:, :14].tolist(), strict=True):
        length = tour_length(p.unsqueeze(0), torch.tensor([tour]))
        turned = [tour[:i] + tour[i:j][::-1] + tour[j:] for i, j in itertools.combinations(range(15), 2) if j > i + 1]
        every = tour_length(p.expand(len(turned), -1, -1), torch.tensor(turned))
        assert (every >= length - 1e-9).all()


def test_no_stretch_turned_around_makes_a_greedy_path_shorter():
    for p, tour in zip(sets := points(3, 12), greedy_tour(sets)[:, :12].tolist(), strict=True):
        far = distances(p)
        # The edge that closes it is one of the twelve; opened there, the path cannot be improved.
        paths = [tour[i:] + tour[:i] for i in range(12)]

        def length(path: list[int], far=far) -> float:
            return sum(far[a, b] for a, b in itertools.pairwise(path))

        def is_best(path: list[int]) -> bool:
            turned = (path[:i] + path[i:j][::-1] + path[j:] for i, j in itertools.combinations(range(1, 12), 2))
            return all(length(t) >= length(path) - 1e-9 for t in turned)

        assert any(is_best(path) for path in paths)


def test_bad_input_is_named(monkeypatch):
    with pytest.raises(ValueError, match="N ≤ 16"):
        shortest_tour(torch.zeros(1, 17, 2))
    with pytest.raises(ValueError, match="points must be"):
        greedy_tour(torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match="visit each"):
        tour_length(torch.zeros(1, 3, 2), torch.tensor([[0, 1, 1]]))
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ImportError, match=r"attnlab\[data\]"):
        christofides_tour(points(1, 5))
