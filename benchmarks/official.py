"""Our sequence mechanisms beside the authors' code, or the peer that users have, with the same weights, on CPU.

    python benchmarks/official.py [--official DIR] [--threads 2] [--seconds 3] [--length 1024] [--only gated] [--busy]

Prints for each the shortest time of inference and of training (forward and backward), theirs over ours (above 1, ours
is faster), how far the outputs differ, and the geometric means. Peers are transformers where it has the mechanism, and
else the authors' repositories: DIR holds checkouts of them, each under the repository's name (DIR/gated_attention of
qiuzh20/gated_attention, say), and titans-pytorch is a package. A peer that is not there is named with the reason. The
packages that such a repository imports and does not need here may be absent.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from official_pairs import PAIRS, Setting, transformers
from torch import Tensor

Call = Callable[..., Any]


def in_turns(calls: list[Call], seconds: float, clock: Callable[[], float]) -> list[float]:
    """The shortest time of each call in milliseconds; they take turns, so that a busy moment hits all of them."""
    shortest = [math.inf] * len(calls)
    begin, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - begin < seconds:  # the first round warms up
        for i, call in enumerate(calls):
            start = clock()
            call()
            if rounds:
                shortest[i] = min(shortest[i], clock() - start)
        rounds += 1
    return [1e3 * t for t in shortest]


def forward(call: Call, inputs: tuple[Tensor, ...]) -> Call:
    def run() -> Tensor:
        with torch.no_grad():
            return call(*inputs)

    return run


def training(call: Call, inputs: tuple[Tensor, ...]) -> Call:
    given = tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs)
    return lambda: call(*given).square().mean().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, help="folder of the authors' checkouts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each comparison, and three rounds at least")
    parser.add_argument("--length", type=int, default=1024, help="tokens")
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--busy", action="store_true", help="the process's own time, of one thread: on a busy machine")
    options = parser.parse_args()
    clock = time.process_time if options.busy else time.perf_counter
    names = sorted({name.split(",")[0] for name in PAIRS})
    if unknown := set((options.only or names[0]).split(",")) - set(names):
        parser.error(f"--only: {', '.join(sorted(unknown))} is not among {', '.join(names)}")
    torch.set_num_threads(1 if options.busy else options.threads)
    setting, ratios = Setting(options.official, options.length), {"inference": [], "training": []}
    print(f"{'mechanism':<24} {'inference: theirs, ours':>28} {'training: theirs, ours':>38}   off by")
    transformers()
    logging.disable(logging.WARNING)  # transformers' advice
    for name, make in PAIRS.items():
        if options.only and name.split(",")[0] not in options.only.split(","):
            continue
        torch.manual_seed(0)
        try:
            pair = make(setting)
            outputs = [forward(call, pair.inputs)() for call in (pair.theirs, pair.ours)]
        except Exception as error:
            print(f"{name:<24} {type(error).__name__}: {str(error)[:110]}", flush=True)
            continue
        off = (outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()
        cells = []
        for work, kind in (("inference", forward), ("training", training)):
            calls = pair.training if pair.training and kind is training else (pair.theirs, pair.ours)
            theirs, ours = in_turns([kind(call, pair.inputs) for call in calls], options.seconds, clock)
            ratios[work].append(theirs / ours)
            cells.append(f"{theirs:>9.1f} {ours:>8.1f} ms  {theirs / ours:>5.2f}×")
        print(f"{name:<24} {cells[0]:>28} {cells[1]:>38}   {off:.0e}", flush=True)
    for work, found in ratios.items():
        if found:
            print(f"{work}: geometric mean {statistics.geometric_mean(found):.2f}×, least {min(found):.2f}×")
    every = ratios["inference"] + ratios["training"]
    if every:
        print(f"both: geometric mean {statistics.geometric_mean(every):.2f}×")


if __name__ == "__main__":
    main()
