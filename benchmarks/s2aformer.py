"""Thin queries and keys on a coarse map: what S2AFormer's attention saves, and what it costs in accuracy.

    python benchmarks/s2aformer.py [--steps 60] [--seconds 0.3]

For 1, 4 and C/heads channels of queries and keys per head, and maps of keys 1, 2 and 4 times coarser: the time of the
attention alone (64 channels, 2 heads, a map of 28×28), and the accuracy on held-out digits of a small S2AFormer.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.models.vision.s2aformer import S2AFormer
from attnlab.nn.spatial.strip import StripAttention


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits at 32×32, and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = F.interpolate(torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1, scale_factor=4)
    return images[order], torch.tensor(found.target)[order]


def milliseconds(module: StripAttention, seconds: float) -> float:
    x, best, begin = torch.randn(4, 28 * 28, 64), float("inf"), time.perf_counter()
    with torch.inference_mode():
        while time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            module(x, grid=(28, 28))
            best = min(best, time.perf_counter() - start)
    return 1e3 * best


def accuracy(images: Tensor, labels: Tensor, steps: int, **options: int) -> float:
    torch.manual_seed(0)
    ratio = options.pop("ratio")
    net = S2AFormer(
        dims=(24, 32), depths=(1, 1), heads=(2, 2), ratios=(ratio, max(ratio // 2, 1)), mlp_ratio=2.0, in_channels=1,
        num_classes=10, **options,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        at = torch.randint(360, len(images), (48,))
        loss = F.cross_entropy(net(images[at]), labels[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return (net.eval()(images[:360]).argmax(-1) == labels[:360]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images, labels = digits()
    print(f"{'coarser':>7} {'qk':>3} {'time':>9} {'accuracy':>9}")
    for ratio in (1, 2, 4):
        for width in (1, 4, None):
            timed = StripAttention(64, heads=2, ratio=ratio, qk_dim=width or 32)
            right = accuracy(images, labels, options.steps, ratio=ratio, qk_dim=width or 12)
            took = milliseconds(timed, options.seconds)
            print(f"{ratio:>7} {width or 'C/h':>3} {took:>6.1f} ms {100 * right:>8.1f}%", flush=True)


if __name__ == "__main__":
    main()
