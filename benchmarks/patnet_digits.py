"""What PATNet adds to partial convolution: time against depthwise convolution, and accuracy on digits.

    python benchmarks/patnet_digits.py [--seeds 2] [--steps 120]

1. A partial and a depthwise 3×3 convolution of as many multiplications, on CPU. 2. Tiny networks on handwritten digits
(enlarged to 64×64): without attention, over channels, over channels and places, and with self-attention at the end.
Prints times, their ratio, and accuracies on digits not trained on, the mean of the seeds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from attnlab.models.vision.patnet import PATNet
from attnlab.nn.spatial.partial import PartialChannel, PartialConv

NETS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("none (FasterNet)", {"attention": False, "separate": False}),
    ("channels", {"of_channels": True}),
    ("channels, self", {}),
    ("channels, self, places", {"spatial": True}),
)


def shortest(call: Callable[[], object], repeats: int = 20) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times)


@torch.no_grad()
def times() -> None:
    for dim, size in ((64, 56), (128, 28)):
        # 9 (C/4)² multiplications a place: a depthwise convolution of C²/16 channels.
        wide = dim * dim // 16
        depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False).to(memory_format=torch.channels_last)
        x = torch.randn(1, dim, size, size).contiguous(memory_format=torch.channels_last)
        y = torch.randn(1, wide, size, size).contiguous(memory_format=torch.channels_last)
        partial = PartialConv(dim)
        ours, theirs = shortest(lambda p=partial, x=x: p(x)), shortest(lambda d=depthwise, y=y: d(y))
        print(f"{size}×{size}, {dim} channels: partial {ours:.2f} ms, depthwise {theirs:.2f} ms, {theirs / ours:.1f}×")


def net(of_channels: bool = False, **options: Any) -> PATNet:
    made = PATNet(dim=16, depths=(1, 1, 1, 1), head_dim=64, heads=4, in_channels=1, num_classes=10, **options)
    if of_channels:  # in the last stage too
        last = made.stages[-1].blocks[0]
        last.mixer, last.separate = PartialChannel(128), False
    return made


def accuracy(made: nn.Module, x: Tensor, y: Tensor, steps: int) -> float:
    optimiser = torch.optim.AdamW(made.parameters(), lr=3e-3)
    for _ in range(steps):
        at = torch.randint(0, 1200, (64,))
        optimiser.zero_grad()
        F.cross_entropy(made(x[at]), y[at]).backward()
        optimiser.step()
    made.eval()
    with torch.no_grad():
        return (made(x[1200:]).argmax(1) == y[1200:]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=120)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    times()
    data = load_digits()
    x, y = torch.tensor(data.images).float()[:, None] / 8 - 1, torch.tensor(data.target)
    x = F.interpolate(x, size=64, mode="bilinear")
    for name, options in NETS:
        found = []
        for seed in range(arguments.seeds):
            torch.manual_seed(seed)
            found.append(accuracy(net(**options), x, y, arguments.steps))
        print(f"attention over {name:24s} {statistics.mean(found):.3f}")


if __name__ == "__main__":
    main()
