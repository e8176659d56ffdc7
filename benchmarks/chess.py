"""Is skipping channels faster than computing them? One token through feed-forwards and decoders, dense and sparse.

    python benchmarks/chess.py [--dim 2048 --hidden 5504] [--threads 2]

Float32 on the CPU; the dense network computes each projection as one matrix-vector product.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from attnlab import build
from attnlab.recipes.chess import calibrate, sparsify


def interleaved(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median milliseconds of each, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: sorted(found)[rounds // 2] for name, found in times.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=5504)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = build(
        "llama", vocabulary=1000, dim=given.dim, depth=given.depth, heads=given.dim // 128, hidden=given.hidden
    ).eval()
    text = torch.randint(0, 1000, (1, 128))
    token = torch.randn(1, 1, given.dim)
    print(f"one token, {given.threads} threads, C = {given.dim}, {given.hidden} channels; ms, and dense / sparse")
    for sparsity in (0.5, 0.7):
        thresholds = calibrate(model, [text], sparsity=sparsity)
        models = {"dense": model} | {m: sparsify(model, thresholds, method=m) for m in ("cats", "chess", "chess+")}
        feeds = interleaved({n: lambda m=m: m.blocks[0].mlp(token) for n, m in models.items()}, given.rounds)
        steps: dict[str, Callable[[], object]] = {}
        for name, m in models.items():
            _, state = m(text, state=m.initial_state(1))
            steps[name] = lambda m=m, state=state: m(text[:, -1:], state=state)
        whole = interleaved(steps, given.rounds)
        for name in models:
            print(
                f"sparsity {sparsity}  {name:7s} feed-forward {feeds[name]:7.2f} {feeds['dense'] / feeds[name]:5.2f}×"
                f"   decoding step {whole[name]:7.2f} {whole['dense'] / whole[name]:5.2f}×",
                flush=True,
            )


if __name__ == "__main__":
    main()
