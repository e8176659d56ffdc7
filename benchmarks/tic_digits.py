"""One resolution to train on, larger ones to be tested on: TiC beside a vision transformer with interpolated positions.

    python benchmarks/tic_digits.py [--steps 200]

A picture is filled with copies of one of scikit-learn's digits, 16 pixels each: which digit? Both
networks are trained at 32×32 and tested, on digits held out, at 32, 48 and 64 pixels without any change.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.models.vision.tic import TiC
from attnlab.models.vision.vit import ViT

SIDES = (32, 48, 64)


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits at 16 pixels, between 0 and 2, and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return F.interpolate(images, size=(16, 16), mode="bilinear")[order], torch.tensor(found.target)[order]


def filled(images: Tensor, side: int) -> Tensor:
    """Copies of each image side by side on a canvas of `side` pixels."""
    return images.repeat(1, 1, side // 16, side // 16)


def train(net: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=6e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in range(steps):
        at = torch.randint(len(images), (32,), generator=rng)
        loss = F.cross_entropy(net(filled(images[at], SIDES[0])), labels[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor, side: int) -> float:
    logits = torch.cat([net(filled(part, side)) for part in images.split(36)])
    return 100 * (logits.argmax(-1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images, labels = digits()
    held, rest = slice(0, 360), slice(360, None)
    shared = {"dim": 16, "depths": (1, 2), "heads": (2, 4), "kernel": 5, "in_channels": 1, "num_classes": 10}
    torch.manual_seed(0)
    nets = {
        "TiC": TiC(**shared),
        "TiC, no shift, no pooling": TiC(**shared, shift="none", inter_pool="none"),
        "ViT": ViT(dim=32, depth=3, heads=4, image=32, patch=4, in_channels=1, num_classes=10),
    }
    print(f"{'':<27}" + "".join(f"{side:>9} px" for side in SIDES))
    for name, net in nets.items():
        train(net, images[rest], labels[rest], options.steps)
        found = [accuracy(net, images[held], labels[held], side) for side in SIDES]
        print(f"{name:<27}" + "".join(f"{a:>11.1f}%" for a in found), flush=True)


if __name__ == "__main__":
    main()
