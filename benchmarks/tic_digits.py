"""One resolution to train on, larger ones to be tested on: TiC beside a vision transformer with interpolated positions.

    python benchmarks/tic_digits.py [--steps 200]

Trains both on scikit-learn's digits at 32×32 and prints the accuracy on held-out digits shown in the middle of larger
canvases (the object keeps its size), and scaled up to fill them, at 32, 48 and 64 pixels.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.models.vision.tic import TiC
from attnlab.models.vision.vit import ViT

SIDES = (32, 48, 64)


def digits(side: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits scaled to `side`, between 0 and 2, and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return F.interpolate(images, size=(side, side), mode="bilinear")[order], torch.tensor(found.target)[order]


def canvas(images: Tensor, side: int) -> Tensor:
    """The same images in the middle of a larger canvas."""
    room = (side - images.shape[-1]) // 2
    return F.pad(images, (room,) * 4)


def train(net: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        at = torch.randint(len(images), (48,), generator=rng)
        loss = F.cross_entropy(net(images[at]), labels[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * (net(images).argmax(-1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    small, labels = digits(SIDES[0])
    held, rest = slice(0, 360), slice(360, None)
    shared = {"dim": 32, "depths": (2, 2), "heads": (2, 4), "kernel": 5, "in_channels": 1, "num_classes": 10}
    torch.manual_seed(0)
    nets = {
        "TiC": TiC(**shared),
        "TiC, no shift, no pooling": TiC(**shared, shift="none", inter_pool="none"),
        "ViT": ViT(dim=64, depth=4, heads=4, image=32, patch=4, in_channels=1, num_classes=10),
    }
    print(f"{'':<27}" + "".join(f"{f'canvas {s}':>12}" for s in SIDES) + "".join(f"{f'scaled {s}':>12}" for s in SIDES))
    for name, net in nets.items():
        train(net, small[rest], labels[rest], options.steps)
        on_canvas = [accuracy(net, canvas(small[held], side), labels[held]) for side in SIDES]
        scaled = [accuracy(net, digits(side)[0][held], labels[held]) for side in SIDES]
        print(f"{name:<27}" + "".join(f"{a:>11.1f}%" for a in on_canvas + scaled), flush=True)


if __name__ == "__main__":
    main()
