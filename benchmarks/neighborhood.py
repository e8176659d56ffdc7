"""Neighborhood attention: what a stride buys and costs, and what a window saves over masked dense attention.

    python benchmarks/neighborhood.py [--threads 2] [--repeats 9]

First the trade of arXiv 2504.16922 on a 32×32 grid with a window of 16: with the stride, neighbors share windows, so
fewer pairs are computed in vain and time falls, while the output moves away from that of stride 1 (relative error on
patches of a photograph as queries and keys). Then windows of 7, 11 and 15 on 64×64 tokens, dilation 1 and 4, against
torch's dense attention with the same mask: time, and the memory of the scores or of the tiles. Lines print ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from backbones import in_turns
from torch import Tensor

from attnlab import attend, explain
from attnlab.backends.tiles import tiling
from attnlab.patterns import Neighborhood, speedup


def photograph(side: int, dim: int) -> Tensor:
    """Patches of scikit-image's astronaut as tokens `(1, 1, side², dim)`, normed: neighbors are alike, as in images."""
    from skimage.data import astronaut

    image = torch.tensor(astronaut(), dtype=torch.float32).permute(2, 0, 1)[None] / 255
    image = F.interpolate(image, size=(side * 4, side * 4), mode="area")
    tokens = F.unfold(image, 4, stride=4).transpose(1, 2)
    torch.manual_seed(0)
    return F.layer_norm(tokens @ torch.randn(tokens.shape[-1], dim), (dim,))[:, None]


def timed(q: Tensor, pattern: Neighborhood, backend: str) -> Callable[[], object]:
    return lambda: attend(q, q, q, pattern=pattern, backend=backend)


def strides(repeats: int) -> None:
    side, kernel, heads, dim = 32, 16, 4, 32
    q = photograph(side, heads * dim).unflatten(-1, (heads, dim)).squeeze(1).transpose(1, 2).contiguous()
    patterns = {s: Neighborhood((side, side), kernel, 1, s) for s in (1, 2, 4, 8, 16)}
    times = in_turns([timed(q, p, "tiles") for p in patterns.values()], repeats)
    exact = attend(q, q, q, pattern=patterns[1])
    print(f"{side}×{side} tokens, window {kernel}, {heads} heads of {dim}: time and error against the stride")
    print(f"{'stride':>6} {'time':>9} {'faster':>7} {'error':>7} {'pairs computed':>15}   tiles of 4×4 on a GPU")
    for (stride, pattern), time in zip(patterns.items(), times, strict=True):
        error = (attend(q, q, q, pattern=pattern) - exact).norm() / exact.norm()
        pairs = tiling(pattern, side * side, side * side).pairs / (side * side * kernel * kernel)
        model = speedup(pattern, (4, 4), (4, 4))
        print(f"{stride:>6} {time:>6.2f} ms {times[0] / time:>6.2f}× {error:>7.3f} {pairs:>14.2f}×   {model}")


def windows(repeats: int) -> None:
    side, heads, dim = 64, 4, 32
    q = torch.randn(1, heads, side * side, dim)
    print(f"\n{side}×{side} tokens, {heads} heads of {dim}: against torch's dense attention with the same mask")
    print(f"{'window':>6} {'dilation':>8} {'tiles':>9} {'dense':>9}   dense / tiles   memory of dense / tiles")
    for kernel in (7, 11, 15):
        for dilation in (1, 4):
            pattern = Neighborhood((side, side), kernel, dilation)
            ours, dense = in_turns([timed(q, pattern, "tiles"), timed(q, pattern, "dense")], repeats)
            rows = {r.name: r.cost for r in explain(q, q, q, pattern=pattern).rows if r.cost is not None}
            memory = rows["dense"].memory / rows["tiles"].memory
            print(f"{kernel:>6} {dilation:>8} {ours:>6.2f} ms {dense:>6.1f} ms {dense / ours:>14.1f}× {memory:>20.1f}×")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        strides(arguments.repeats)
        windows(max(2, arguments.repeats // 3))


if __name__ == "__main__":
    main()
