"""Proxy attention beside dense causal attention of torch, in one run, at the sparsity that the paper reports.

    python benchmarks/proxy.py [--threads 2] [--tokens 16384 32768] [--rounds 2] [--cpu]

Queries and keys are made so that blocks of keys differ as in a language model: their logits are spread normally, by
another deviation in each head, and γ = 0.95 and 0.9 leave out about 0.69 and 0.8 of the pairs, as for Llama-3.1-8B.
Prints the share left out, the attention's relative error, milliseconds (with --cpu those of the processor), what of
them the choice takes, and how many times faster than `F.scaled_dot_product_attention(is_causal=True)` it is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import attend
from attnlab.routing import ProxyHeads

HEADS, KV_HEADS, DIM, BLOCK = 8, 2, 128, 128


def least(function: Callable[[], object], rounds: int, clock: Callable[[], float]) -> float:
    """The least milliseconds of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        start = clock()
        function()
        best = min(best, 1e3 * (clock() - start))
    return best


def heads(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of heads that look at the same blocks, some at fewer of them than others."""
    blocks = torch.randn(-(-n // BLOCK)).repeat_interleave(BLOCK)[:n]
    directions = torch.linalg.qr(torch.randn(DIM, KV_HEADS)).Q.T
    spread = torch.linspace(2.0, 3.2, HEADS) * DIM**0.5
    q = torch.randn(1, HEADS, n, DIM) / 2
    q += (spread[:, None] * directions.repeat_interleave(HEADS // KV_HEADS, 0))[None, :, None]
    k = torch.randn(1, KV_HEADS, n, DIM) + blocks[None, None, :, None] * directions[None, :, None]
    return q, k, torch.randn_like(k)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{HEADS} heads ({KV_HEADS} of keys) of {DIM}, blocks of {BLOCK}, float32, {options.threads} threads")
    print(f"{'tokens':>7}{'γ':>6}{'left out':>10}{'error':>8}{'dense':>10}{'proxy':>10}{'choice':>10}{'times':>8}")
    for n in options.tokens:
        q, k, v = heads(n)
        exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        slow = least(dense, options.rounds, clock)
        for gamma in (0.95, 0.9):
            route = ProxyHeads(gamma, BLOCK)
            table = route.select(q, k).left.table  # type: ignore[attr-defined]
            blocks = table.shape[-1]
            left_out = 1 - table.sum().item() / (HEADS * blocks * (blocks + 1) / 2)

            def sparse(route: ProxyHeads = route, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
                return attend(q, k, v, route=route)

            error = ((sparse() - exact).norm() / exact.norm()).item()
            fast = least(sparse, options.rounds, clock)
            choice = least(lambda r=route, q=q, k=k: r.select(q, k), options.rounds, clock)  # type: ignore[misc]
            print(f"{n:>7}{gamma:>6}{left_out:>10.2f}{error:>8.3f}{slow:>10.0f}{fast:>10.0f}{choice:>10.0f}", end="")
            print(f"{slow / fast:>7.2f}×")


if __name__ == "__main__":
    main()
