"""Attention over blocks chosen from the content, beside dense causal attention of torch, in one run.

    python benchmarks/routed.py [--threads 2] [--tokens 16384] [--rounds 3] [--cpu]

Prints, per case, milliseconds (with --cpu those of the processor, which a busy machine does not stretch) and how many
times faster than `F.scaled_dot_product_attention(is_causal=True)` it is, in inference and in training (forward and
backward), choosing the blocks included; and the share of dense causal attention's pairs that it computes, the
reciprocal of which bounds what can be gained at equal speed per pair. Asked for: 5× and 4× for the best 8 blocks of 64
tokens. "64 blocks in all" are blocks of 256 at 16,384 tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import attend
from attnlab.attend import pose
from attnlab.backends.routed import tile_plan
from attnlab.backends.routed.plan import parts
from attnlab.routing import BlockRoute, ThresholdBlocks, TopKBlocks


def in_turns(functions: list[Callable[[], object]], rounds: int, clock: Callable[[], float]) -> list[float]:
    """The least milliseconds of each, measured in turns so that a busy machine slows all alike."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = clock()
            function()
            best[i] = min(best[i], 1e3 * (clock() - start))
    return best


def training(run: Callable[[Tensor, Tensor, Tensor], Tensor], *tensors: Tensor) -> Callable[[], object]:
    inputs = [x.detach().requires_grad_() for x in tensors]
    weight = torch.randn_like(tensors[0])
    return lambda: torch.autograd.grad(run(*inputs), inputs, weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    n = options.tokens
    q, k, v = (torch.randn(1, 4, n, 64) for _ in range(3))
    cases: dict[str, BlockRoute] = {
        "blocks of 64, causal": TopKBlocks(8, block=64, causal=True),
        "blocks of 64": TopKBlocks(8, block=64),
        "64 blocks in all, causal": TopKBlocks(8, block=n // 64, causal=True),
        "64 blocks in all": TopKBlocks(8, block=n // 64),
        "64 blocks, each query alone": TopKBlocks(8, block=n // 64, query_block=1),
        "an eighth of the score": ThresholdBlocks(0.125, block=n // 64),
    }
    runs: list[Callable[..., Tensor]] = [lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)]
    runs += [lambda q, k, v, r=route: attend(q, k, v, route=r, backend="routed") for route in cases.values()]
    with torch.no_grad():
        inference = in_turns([lambda r=run: r(q, k, v) for run in runs], options.rounds, clock)
    train = in_turns([training(run, q, k, v) for run in runs], options.rounds, clock)

    print(
        f"1 × 4 heads × {n} × 64, float32, {options.threads} threads; the best 8 blocks; dense causal attention takes"
    )
    print(f"{inference[0]:.0f} ms and {train[0]:.0f} ms with its backward")
    print(f"{'':<30}{'pairs':>7}{'inference':>18}{'training':>20}")
    for (name, route), forward, both in zip(cases.items(), inference[1:], train[1:], strict=True):
        found = parts(pose(q, k, v, route=route).pattern)
        assert found is not None
        share = tile_plan(*found, 1, 4, 4).pairs / (4 * n * (n + 1) / 2)
        print(
            f"{name:<30}{share:>6.1%}{forward:>9.0f} ms {inference[0] / forward:>5.1f}×"
            f"{both:>11.0f} ms {train[0] / both:>5.1f}×"
        )


if __name__ == "__main__":
    main()
