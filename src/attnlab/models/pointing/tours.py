"""Round trips through points: the shortest, three approximations that teach where it is out of reach, and lengths.

Tours are (B, N + 1): the positions from 0 on, the second below the last, then N for the end.

    teacher            how                                        cost per set      mean length at N = 10, 20, 50
    shortest_tour      Held and Karp, N ≤ 16                      N² 2ᴺ             2.87
    greedy_tour        A1: the shortest edges that fit, 2-opt     N² per exchange   3.04 (3.07), 4.18 (4.24), 6.3 (6.46)
    improved_tour      A2: nearest neighbours, then 2-opt         N³ per exchange   2.87 (2.87), 3.85 (3.86), 5.7 (5.84)
    christofides_tour  A3: tree and matching, then 2-opt          N³                2.88 (2.87), 3.89 (3.85), 5.8 (5.79)

In brackets what arXiv 1506.03134 has for the solvers that it calls A1, A2 and A3 and cites as code alone: these are of
the same kinds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnlab.models.pointing.problems import solve_each


def shortest_tour(points: Tensor) -> Tensor:
    """Each set's shortest round trip from position 0, its second position below its last (Held and Karp).

    Cost: N² 2ᴺ per set, for N ≤ 16.
    """
    if points.ndim == 3 and points.shape[1] > 16:
        raise ValueError(f"shortest_tour is exact and takes N ≤ 16 points, got {points.shape[1]}")
    return _each(points, _held_karp)


def greedy_tour(points: Tensor) -> Tensor:
    """A1: joins the two closest places whose edge neither branches nor closes a ring, until one path is left.

    2-opt makes the path shorter, without regard to the edge that closes it at last.
    """
    return _each(points, lambda far: _two_opt(np.array(_greedy(far))[None], far, closed=False)[0].tolist())


def improved_tour(points: Tensor) -> Tensor:
    """A2: from every start the way to the nearest place left, each made shorter by 2-opt; the best of them."""
    return _each(points, lambda far: _best(_two_opt(_nearest(far), far), far))


def christofides_tour(points: Tensor) -> Tensor:
    """A3: a spanning tree and the cheapest matching of its odd places, walked with shortcuts, then 2-opt.

    Before 2-opt it is at most 1.5 times as long as the shortest, and 2-opt never makes it longer. The matching needs
    networkx, of the `data` extra.
    """
    return _each(points, lambda far: _best(_two_opt(_christofides(far)[None], far), far))


def tour_length(points: Tensor, tours: Tensor) -> Tensor:
    """The length (B,) of each round trip; ValueError unless it visits each point once."""
    n = points.shape[1]
    tours = tours[:, :n]
    if not torch.equal(tours.sort(1).values, torch.arange(n, device=tours.device).expand(len(points), -1)):
        raise ValueError(f"tours must visit each of the {n} points once")
    path = points.gather(1, tours.unsqueeze(-1).expand(-1, -1, 2))
    return (path - path.roll(-1, 1)).norm(dim=-1).sum(1)


def _each(points: Tensor, solve: Callable[[np.ndarray], list[int]]) -> Tensor:
    """`solve` gives a ring from the distances (N, N); here it starts at 0, in the direction of the lower neighbour."""

    def oriented(p: np.ndarray) -> list[int]:
        ring = solve(np.linalg.norm(p[:, None] - p[None], axis=-1)) if len(p) > 2 else list(range(len(p)))
        at = ring.index(0)
        ring = ring[at:] + ring[:at]
        return ring if ring[1] <= ring[-1] else [0, *ring[:0:-1]]

    return solve_each(points, 2, oriented)


def _held_karp(far: np.ndarray) -> list[int]:
    """cost[S, j]: the shortest way from 0 through all of S, a set of the others as bits, that ends at j in S."""
    n = len(far) - 1
    sets = np.arange(1 << n)
    sizes = ((sets[:, None] >> np.arange(n)) & 1).sum(1)
    cost = np.full((1 << n, n), np.inf)
    before = np.zeros((1 << n, n), dtype=np.int64)
    cost[1 << np.arange(n), np.arange(n)] = far[0, 1:]
    for size in range(2, n + 1):
        here = sets[sizes == size]
        for j in range(n):
            those = here[(here >> j) & 1 == 1]
            ways = cost[those ^ (1 << j)] + far[1:, 1 + j]
            before[those, j] = ways.argmin(1)
            cost[those, j] = ways.min(1)
    at, left, tour = int((cost[-1] + far[1:, 0]).argmin()), (1 << n) - 1, [0]
    while left:
        tour.append(at + 1)
        left, at = left ^ (1 << at), int(before[left, at])
    return tour


def _greedy(far: np.ndarray) -> list[int]:
    n = len(far)
    rows, columns = np.triu_indices(n, 1)
    joined: list[list[int]] = [[] for _ in range(n)]
    other_end = list(range(n))  # of the path that a place ends
    for e in far[rows, columns].argsort(kind="stable"):
        a, b = int(rows[e]), int(columns[e])
        if len(joined[a]) < 2 and len(joined[b]) < 2 and other_end[a] != b:
            joined[a].append(b)
            joined[b].append(a)
            ends = other_end[a], other_end[b]
            other_end[ends[0]], other_end[ends[1]] = ends[1], ends[0]
    path = [next(i for i in range(n) if len(joined[i]) == 1)]
    while len(path) < n:
        path.append(next(i for i in joined[path[-1]] if len(path) < 2 or i != path[-2]))
    return path


def _nearest(far: np.ndarray) -> np.ndarray:
    """The tours (N, N) of nearest neighbours from each of the N places."""
    n = len(far)
    starts = np.arange(n)
    tours, seen = np.zeros((n, n), dtype=np.int64), np.eye(n, dtype=bool)
    tours[:, 0] = starts
    for step in range(1, n):
        tours[:, step] = np.where(seen, np.inf, far[tours[:, step - 1]]).argmin(1)
        seen[starts, tours[:, step]] = True
    return tours


def _two_opt(tours: np.ndarray, far: np.ndarray, *, closed: bool = True) -> np.ndarray:
    """Turns around the stretch of each tour (T, N) that saves most, as long as one saves.

    Where the tours are not `closed`, the edge from the last place to the first counts for nothing.
    """
    n = tours.shape[1]
    places, later = np.arange(n), np.triu(np.ones((n, n), dtype=bool), 1)
    later[:, -1] &= closed
    tours, active = tours.copy(), np.arange(len(tours))
    while len(active):
        a = tours[active]
        b = np.roll(a, -1, 1)
        edges = far[a, b]
        # Edges i and j, a stretch from i + 1 to j turned around: a_i b_i, a_j b_j become a_i a_j, b_i b_j.
        change = far[a[:, :, None], a[:, None]] + far[b[:, :, None], b[:, None]] - edges[:, :, None] - edges[:, None]
        change = np.where(later, change, 0.0).reshape(len(a), -1)
        best = change.argmin(1)
        better = change[np.arange(len(a)), best] < -1e-12
        active, i, j = active[better], best[better, None] // n, best[better, None] % n
        inside = (places > i) & (places <= j)
        tours[active] = np.take_along_axis(tours[active], np.where(inside, i + 1 + j - places, places), 1)
    return tours


def _best(tours: np.ndarray, far: np.ndarray) -> list[int]:
    return tours[far[tours, np.roll(tours, -1, 1)].sum(1).argmin()].tolist()


def _christofides(far: np.ndarray) -> np.ndarray:
    n = len(far)
    edges: list[list[int]] = [[] for _ in range(n)]
    # Prim's tree: the place nearest to it joins.
    near, parent = far[0].copy(), np.zeros(n, dtype=np.int64)
    outside = np.arange(n) > 0
    while outside.any():
        at = int(np.where(outside, near, np.inf).argmin())
        outside[at] = False
        edges[at].append(int(parent[at]))
        edges[parent[at]].append(at)
        closer = far[at] < near
        near, parent = np.where(closer, far[at], near), np.where(closer, at, parent)
    odd = [i for i in range(n) if len(edges[i]) % 2]
    networkx = _networkx()
    graph = networkx.Graph()
    graph.add_weighted_edges_from((a, b, -far[a, b]) for k, a in enumerate(odd) for b in odd[:k])
    for a, b in networkx.max_weight_matching(graph, maxcardinality=True):
        edges[a].append(b)
        edges[b].append(a)
    # Hierholzer's walk over every edge; a place is kept where it comes first.
    stack, walk = [0], []
    while stack:
        if edges[stack[-1]]:
            to = edges[stack[-1]].pop()
            edges[to].remove(stack[-1])
            stack.append(to)
        else:
            walk.append(stack.pop())
    return np.array(list(dict.fromkeys(walk)))


def _networkx() -> Any:
    try:
        return importlib.import_module("networkx")
    except ImportError as error:
        raise ImportError("christofides_tour needs the package 'networkx': pip install 'attnlab[data]'") from error
