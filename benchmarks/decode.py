"""What a decoding step costs as the text grows: python benchmarks/decode.py

One token through one layer of each mechanism, at several positions, in microseconds and as a ratio to torch's own
attention on a cache of the same length together with the two projections: the least that a step over all keys costs.
A window's step does not grow; PowerAttention's grows with log₂ N; the others read every key once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import attnlab
from attnlab.positions import Rotary

DIM, HEADS = 256, 4
MECHANISMS: dict[str, dict] = {
    "multihead": {},
    "gated": {},
    "affine": {},
    "sigmoid": dict(length=4096),
    "sliding_window": dict(window=256),
    "power": dict(block=64),
}


def microseconds(step: Callable[[], object], repeats: int = 15, count: int = 8) -> float:
    for _ in range(3):
        step()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            step()
        best = min(best, (time.perf_counter() - start) / count)
    return best * 1e6


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="*", default=[64, 4096, 65536])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    d = DIM // HEADS
    x, q = torch.randn(1, 1, DIM), torch.randn(1, HEADS, 1, d)
    wqkv, wo = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
    floor = {}
    for n in arguments.positions:
        k, v = torch.randn(1, HEADS, n, d), torch.randn(1, HEADS, n, d)
        floor[n] = microseconds(lambda k=k, v=v: (wqkv(x), F.scaled_dot_product_attention(q, k, v), wo(x)))
    print(f"{'position':16s}" + "".join(f"{n:>18,d}" for n in arguments.positions) + "     last / first")
    print(f"{'torch':16s}" + "".join(f"{t:11.0f} µs    " for t in floor.values()))
    for name, options in MECHANISMS.items():
        layer = attnlab.build(name, DIM, heads=HEADS, causal=True, position=Rotary(d), **options).eval()
        times = []
        for n in arguments.positions:
            state, past = layer.initial_state(1), torch.randn(1, HEADS, n, d)
            (state.append if hasattr(state, "append") else state.extend)(past, past)
            times.append(microseconds(lambda state=state, layer=layer: layer(x, state=state)))
        cells = [f"{t:11.0f} ({t / floor[n]:4.2f}×)" for n, t in zip(arguments.positions, times, strict=True)]
        print(f"{name:16s}" + "".join(cells) + f"{times[-1] / times[0]:12.1f}×")


if __name__ == "__main__":
    main()
