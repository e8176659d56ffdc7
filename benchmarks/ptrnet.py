"""Hulls, sorting, triangulations and tours by pointing, against dictionaries of positions, and at more points.

    python benchmarks/ptrnet.py [--problem hull|sort|delaunay|tour] [--network pointer|attention|dictionary|all]
        [--order x|none] [--teacher optimal|a1|a2|a3] [--steps 8000] [--dim 128]

All networks are trained on sets of 5 to 8 points, or numbers, and asked at 5 to 20 (a dictionary has words for 20).
8,000 steps of 128 sets are the million examples of arXiv 1506.03134, at a quarter of its width. Hulls, by points:

                5      8      10     15     20    three minutes of one core each
    pointer     96 %   87 %   79 %   60 %   36 %  area 99.3 % and more, hardly ever crossing
    attention   91 %   86 %    0 %    0 %    0 %  fails beyond the lengths it was trained at
    dictionary  86 %   64 %    0 %    0 %    0 %

Tours and triangulations need more than that: after 12,000 steps tours of 5 points are 2.44 long (shortest 2.16), and
14 % of the triangulations of 5 points are right after 4,000.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from torch import Tensor

from attnlab.models.pointing.answering import Answering, permutation, unused
from attnlab.models.pointing.problems import convex_hull, delaunay, judge_hulls, judge_triangles, random_points
from attnlab.models.pointing.ptrnet import PointerNetwork
from attnlab.models.pointing.seq2seq import PositionDictionary
from attnlab.models.pointing.tours import christofides_tour, greedy_tour, improved_tour, shortest_tour, tour_length
from attnlab.recipes.minilm import warm_then_decay
from attnlab.recipes.pointing import in_order, teach

MOST = 20
TRAINED = (5, 6, 7, 8)
ASKED = (5, 8, 10, 15, 20)
TEACHERS = {"optimal": shortest_tour, "a1": greedy_tour, "a2": improved_tour, "a3": christofides_tour}


def sort(numbers: Tensor) -> Tensor:
    """The positions of the numbers (B, N, 1) in rising order, and the end."""
    order = numbers.squeeze(-1).argsort(1)
    return torch.cat((order, torch.full_like(order[:, :1], order.shape[1])), 1)


def ask(net: Answering, problem: str, points: Tensor, wanted: Tensor) -> str:
    n = points.shape[1]
    if problem == "hull":
        scores = judge_hulls(points, net.decode(points, beam=2, allowed=unused).positions, wanted)
        area = "FAIL" if scores.fails else f"{scores.area:.1%}"
        return f"accuracy {scores.accuracy:6.1%}   area {area:>6s}   crossing {scores.crossing:.1%}"
    if problem == "delaunay":
        found = net.decode(points, beam=2, steps=3 * (2 * n - 5) + 1).positions
        accuracy, coverage = judge_triangles(found, wanted, n)
        return f"accuracy {accuracy:6.1%}   coverage {coverage:6.1%}"
    found = net.decode(points, beam=4, allowed=permutation).positions
    if problem == "sort":
        return f"accuracy {(found == wanted).all(1).float().mean():6.1%}"
    solvers = {name: solve for name, solve in TEACHERS.items() if name != "optimal" or n <= 10}
    lengths = {name: tour_length(points, solve(points)).mean() for name, solve in solvers.items()}
    others = "  ".join(f"{name} {length:.2f}" for name, length in lengths.items())
    return f"length {tour_length(points, found).mean():.2f}   {others}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--problem", choices=("hull", "sort", "delaunay", "tour"), default="hull")
    parser.add_argument("--network", choices=("pointer", "attention", "dictionary", "all"), default="all")
    parser.add_argument("--order", choices=("x", "none"), default="x")
    parser.add_argument("--teacher", choices=tuple(TEACHERS), default="optimal")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rate", type=float, default=4e-3)
    given = parser.parse_args()
    axes = 1 if given.problem == "sort" else 2
    solve = {"hull": convex_hull, "sort": sort, "delaunay": delaunay, "tour": TEACHERS[given.teacher]}[given.problem]

    def draw(batch: int, n: int, generator: torch.Generator) -> Tensor:
        points = random_points(batch, n, generator)[..., :axes]
        return in_order(points) if given.order == "x" and given.problem != "sort" else points

    options = {"dim": given.dim, "in_channels": axes}
    networks = {
        "pointer": lambda: PointerNetwork(**options),
        "attention": lambda: PositionDictionary(most=MOST, **options),
        "dictionary": lambda: PositionDictionary(most=MOST, attention=False, **options),
    }
    for name, build in networks.items():
        if given.network not in (name, "all"):
            continue
        torch.manual_seed(0)
        net, began = build(), time.process_time()
        teach(
            net, solve, partial(draw, generator=torch.Generator().manual_seed(0)), sizes=TRAINED, steps=given.steps,
            rate=warm_then_decay(given.rate, given.steps, warm_up=given.steps // 10), optimizer=torch.optim.Adam,
        )  # fmt: skip
        print(f"{name}, trained on {TRAINED[0]} to {TRAINED[-1]} points for {time.process_time() - began:.0f} s of CPU")
        for n in ASKED:
            points = draw(300, n, torch.Generator().manual_seed(7))
            wanted = points if given.problem == "tour" else solve(points)
            print(f"  {n:3d} points   {ask(net, given.problem, points, wanted)}", flush=True)


if __name__ == "__main__":
    main()
