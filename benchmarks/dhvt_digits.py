"""Learning from few images: python benchmarks/dhvt_digits.py [--images 200] [--steps 200]

A small DHVT (arXiv 2210.05958), the same without one of its three changes, and a plain vision transformer of the same
width with learned places learn a few of scikit-learn's digits. Printed: the accuracy on the last third of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.models.skeletons.parts import MLP
from attnlab.models.skeletons.plain import Plain
from attnlab.models.vision.dhvt import DHVT
from attnlab.nn.multihead import MultiHead

DIM, HEADS, DEPTH, PATCH, SIDE = 48, 4, 3, 4, 16


class Feed(MLP):
    """A plain MLP in the place of the convolving one."""

    def forward(self, x: Tensor, *, grid: object = None) -> Tensor:
        return super().forward(x)


def dhvt(without: str = "") -> nn.Module:
    net = DHVT(dim=DIM, depth=DEPTH, heads=HEADS, patch=PATCH, in_channels=1, num_classes=10)
    if without == "stem":
        net.stem = nn.Conv2d(1, DIM, PATCH, PATCH)  # type: ignore[assignment]
    for block in net.blocks:
        if without == "feed":
            block.mlp = Feed(DIM, 4 * DIM)
        if without == "heads":
            block.mixer = MultiHead(DIM, heads=HEADS, bias=True)
    return net


def plain() -> nn.Module:
    options = {"heads": HEADS, "bias": True}
    return Plain(
        dim=DIM, depth=DEPTH, mixer="multihead", mixer_options=options, image=SIDE, patch=PATCH, in_channels=1,
        num_classes=10,
    )  # fmt: skip


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "DHVT": dhvt,
    "without head tokens": lambda: dhvt("heads"),
    "without convolving feed-forward": lambda: dhvt("feed"),
    "without overlapping patches": lambda: dhvt("stem"),
    "plain, learned places": plain,
}


def run(make: Callable[[], nn.Module], images: int, steps: int, seed: int) -> float:
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    x, labels = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear"), torch.tensor(digits.target)
    split = len(labels) * 2 // 3
    torch.manual_seed(seed)
    chosen = torch.randperm(split)[:images]
    net = make()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 20, 0.05 + 2 * (1 - step / steps))
        rows = chosen[torch.randint(len(chosen), (32,))]
        loss = F.cross_entropy(net(x[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return (net.eval()(x[split:]).argmax(-1) == labels[split:]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    print(f"{'network':34s}{'accuracy':>10s}")
    for name, make in VARIANTS.items():
        found = [run(make, arguments.images, arguments.steps, seed) for seed in range(arguments.seeds)]
        print(f"{name:34s}{sum(found) / len(found):10.1%}", flush=True)


if __name__ == "__main__":
    main()
