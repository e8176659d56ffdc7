"""Whether the planner's choice is the fastest backend: predicted and measured times over a range of problems.

    python benchmarks/choice.py [--threads 2] [--repeats 5]

For each problem the chosen backend, the one that was fastest, and the ratio of their times (1 is a perfect choice).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from backbones import in_turns
from torch import Tensor

from attnlab import attend, explain
from attnlab.patterns import Causal, Documents, Neighborhood, Pattern, PowersOfTwo, Window

SLOWEST = 0.5  # predicted seconds beyond which a backend is not worth the wait

Case = tuple[str, int, Pattern | None, dict[str, Any]]


def cases() -> list[Case]:
    windows = [
        (64, 9),
        (128, 16),
        (256, 16),
        (256, 64),
        (512, 32),
        (512, 128),
        (1024, 64),
        (1024, 256),
        (2048, 512),
        (4096, 256),
    ]
    found: list[Case] = [(f"window {w}", n, Window(w), {}) for n, w in windows]
    for side, kernel in ((7, 3), (14, 3), (14, 7), (28, 7), (28, 13), (56, 7)):
        found.append((f"neighborhood {kernel}×{kernel}", side * side, Neighborhood((side, side), kernel), {}))
    for n in (64, 512):
        found.append(("full, lse", n, None, {"return_lse": True}))
        found.append(("full, sigmoid", n, None, {"weighting": "sigmoid"}))
        found.append(("full, dropout", n, None, {"dropout": 0.1}))
    return [
        *found,
        ("causal", 1024, Causal(), {}),
        ("causal, lse", 1024, Causal(), {"return_lse": True}),
        ("powers of two", 2048, PowersOfTwo(64, 2, 1), {}),
        ("documents of 100", 1000, Documents((100,) * 10), {}),
    ]


def call(heads: list[Tensor], train: bool, **keywords: Any) -> Callable[[], object]:
    def run() -> None:
        out = attend(*heads, **keywords)
        if train:
            out = out if isinstance(out, Tensor) else out[0]
            torch.autograd.grad(out.sum(), heads)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{'':<9} {'problem':<18} {'tokens':>6} {'chosen':>10} {'fastest':>10}  ratio   measured (predicted) ms")
    worst = 1.0
    for train in (False, True):
        for name, tokens, pattern, keywords in cases():
            heads = [torch.randn(1, 4, tokens, 32, requires_grad=train) for _ in range(3)]
            found = explain(*heads, pattern=pattern, **keywords)
            costs = {r.name: r.cost.seconds for r in found.rows if r.cost is not None and r.cost.seconds < SLOWEST}
            runs = [call(heads, train, pattern=pattern, backend=b, **keywords) for b in costs]
            times = dict(zip(costs, in_turns(runs, arguments.repeats), strict=True))
            fastest = min(times, key=lambda b: times[b])
            ratio = times[found.choice] / times[fastest]
            worst = max(worst, ratio)
            numbers = ", ".join(f"{b} {t:.2f} ({1e3 * costs[b]:.2f})" for b, t in times.items())
            kind = "training" if train else "inference"
            print(
                f"{kind:<9} {name:<18} {tokens:>6} {found.choice:>10} {fastest:>10} {ratio:>6.2f}   {numbers}",
                flush=True,
            )
    print(f"the worst choice takes {worst:.2f}× the time of the best")


if __name__ == "__main__":
    main()
