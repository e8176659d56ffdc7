"""Outlook attention beside timm's module, and beside local attention at equal width: inference and training on CPU.

    python benchmarks/outlook.py [--threads 2] [--repeats 20]

Prints the shortest time of each, and timm's time over ours: above 1, ours is faster. Shapes are those of VOLO-D1's and
VOLO-D4's fine stage at 224² (28×28 tokens, stride 2). Then: time per token as the map grows, beside windowed softmax
attention of the same width.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from backbones import in_turns, load_timm
from torch import Tensor, nn

from attnlab.nn.sparse.shifted_window import ShiftedWindow
from attnlab.nn.spatial.outlook import OutlookAttention

SIDE = 28
CASES = ((192, 6, 1), (192, 6, 8), (384, 12, 1), (384, 12, 8))


def infer(module: nn.Module, x: Tensor, **keywords: Any) -> Callable[[], object]:
    def call() -> None:
        with torch.inference_mode():
            module(x, **keywords)

    return call


def train(module: nn.Module, x: Tensor, **keywords: Any) -> Callable[[], object]:
    x = x.clone().requires_grad_()

    def call() -> None:
        module.zero_grad()
        module(x, **keywords).sum().backward()

    return call


def against_timm(repeats: int) -> None:
    timm = load_timm()
    if isinstance(timm, str):
        print(f"timm is absent ({timm}): no comparison")
        return
    print(f"{'dim':>4} {'heads':>5} {'batch':>5}  {'work':<9} {'ours':>9} {'timm':>9}   timm / ours")
    for dim, heads, batch in CASES:
        ours = OutlookAttention(dim, heads=heads, stride=2)
        theirs = timm.models.volo.OutlookAttention(dim, heads, kernel_size=3, padding=1, stride=2)
        x = torch.randn(batch, SIDE * SIDE, dim)
        for work, make in (("inference", infer), ("training", train)):
            calls = [make(ours, x, grid=(SIDE, SIDE)), make(theirs, x.unflatten(1, (SIDE, SIDE)))]
            mine, peer = in_turns(calls, max(repeats * 2 // batch, 5))
            print(f"{dim:>4} {heads:>5} {batch:>5}  {work:<9} {mine:>6.2f} ms {peer:>6.2f} ms   {peer / mine:.2f}×")


def per_token(repeats: int) -> None:
    print("\ngrid        µs per token, inference, dim 192: outlook (stride 2)   outlook (stride 1)   windows of 7")
    for side in (14, 28, 56, 112):
        x, grid = torch.randn(1, side * side, 192), (side, side)
        modules = (
            OutlookAttention(192, heads=6, stride=2),
            OutlookAttention(192, heads=6),
            ShiftedWindow(192, heads=6, window=7),
        )
        times = in_turns([infer(m, x, grid=grid) for m in modules], max(repeats // 4, 3))
        shown = "".join(f"{1e3 * t / side**2:>21.2f}" for t in times)
        print(f"{side:>3}×{side:<3} {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    against_timm(options.repeats)
    per_token(options.repeats)


if __name__ == "__main__":
    main()
