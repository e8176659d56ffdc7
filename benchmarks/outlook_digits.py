"""Is a predicted neighbourhood as good as an attended one? Outlookers beside local softmax attention on digits.

    python benchmarks/outlook_digits.py [--seeds 5] [--steps 200]

A plain network of two blocks on the 8×8 tokens of scikit-learn's digits, once per mixer; widths of the MLP are set so
that each has the parameters of the outlooker's. Accuracy is on the last third of the digits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attnlab.models.skeletons.plain import Plain

DIM, IMAGE = 32, 8
MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "outlook 3×3": ("outlook", {"heads": 2}),
    "outlook 3×3, stride 2": ("outlook", {"heads": 2, "stride": 2}),
    "neighbourhood 3×3": ("neighborhood", {"heads": 2, "kernel": 3}),
    "windows 4×4": ("shifted_window", {"heads": 2, "window": 4}),
    "all to all": ("multihead", {"heads": 2}),
}


def network(name: str, mlp_ratio: float) -> Plain:
    mixer, options = MIXERS[name]
    return Plain(
        dim=DIM, depth=2, mixer=mixer, mixer_options=options, mlp_ratio=mlp_ratio, image=IMAGE, patch=1, in_channels=1,
        num_classes=10, class_token=False,
    )  # fmt: skip


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def matched(name: str) -> Plain:
    """The network whose MLP ratio brings it closest to the outlooker's parameters at ratio 2."""
    goal = size(network("outlook 3×3", 2.0))
    return min((network(name, hidden / DIM) for hidden in range(DIM, 8 * DIM, 2)), key=lambda n: abs(size(n) - goal))


def accuracy(name: str, seed: int, steps: int) -> tuple[float, float]:
    """On held-out digits; and the milliseconds of a training step."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    split = len(images) * 2 // 3
    torch.manual_seed(seed)
    net = matched(name)
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps)
    start = time.perf_counter()
    for _ in range(steps):
        batch = torch.randint(split, (64,))
        loss = F.cross_entropy(net(images[batch]), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    taken = 1e3 * (time.perf_counter() - start) / steps
    net.eval()
    with torch.no_grad():
        return (net(images[split:]).argmax(1) == labels[split:]).float().mean().item(), taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"mixer                   parameters   accuracy (mean ± spread over {options.seeds} seeds)   ms per step")
    for name in MIXERS:
        runs = [accuracy(name, seed, options.steps) for seed in range(options.seeds)]
        found = [a for a, _ in runs]
        deviation = statistics.stdev(found) if len(found) > 1 else 0.0
        shown = f"{statistics.mean(found):.4f} ± {deviation:.4f}"
        print(f"{name:<23} {size(matched(name)):>10,}   {shown:<42} {min(t for _, t in runs):>11.1f}", flush=True)


if __name__ == "__main__":
    main()
