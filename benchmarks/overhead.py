"""What attnlab costs over calling torch: `attend` on a small input, and the import.

    python benchmarks/overhead.py [--threads 2]

Each ratio should stay at or below its limit: 1.4 for `attend` on (1, 4, 64, 32), 0.3 s for the import.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from attnlab import attend
from attnlab.patterns import Causal, Window


def in_turns(functions: list[Callable[[], object]], rounds: int = 15, calls: int = 100) -> list[float]:
    """The least microseconds per call of each, measured in turns so that a busy machine slows all alike."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            for _ in range(calls):
                function()
            best[i] = min(best[i], (time.perf_counter() - start) / calls * 1e6)
    return best


def import_seconds(module: str, repeats: int = 3) -> float:
    """The least seconds in which a new interpreter imports `module`."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    q, k, v = (torch.randn(1, 4, 64, 32) for _ in range(3))
    mask, grouped = Window(9).matrix(64), (q, k[:, :2], v[:, :2])
    cases: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "plain": (lambda: attend(q, k, v), lambda: F.scaled_dot_product_attention(q, k, v)),
        "causal": (
            lambda: attend(q, k, v, pattern=Causal()),
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        ),
        "grouped heads": (
            lambda: attend(*grouped),
            lambda: F.scaled_dot_product_attention(*grouped, enable_gqa=True),
        ),
        "window of 9": (
            lambda: attend(q, k, v, pattern=Window(9)),
            lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        ),
    }
    print(f"{'(1, 4, 64, 32)':<16}{'attend':>10}{'torch':>10}   ratio")
    for name, pair in cases.items():
        ours, torchs = in_turns(list(pair))
        print(f"{name:<16}{ours:>7.1f} µs{torchs:>7.1f} µs   {ours / torchs:.2f}×")
    ours, whole, torchs = (import_seconds(m) for m in ("torch, attnlab", "torch, attnlab.attend", "torch"))
    print(f"import torch {torchs:.2f} s; and attnlab {ours - torchs:+.2f} s; and all of attend {whole - torchs:+.2f} s")


if __name__ == "__main__":
    main()
