"""Terminator on handwritten digits: the sign optimiser beside Adam, and how far features are from mean zero.

    python benchmarks/terminator_digits.py [--image 8] [--epochs 10]

A small Terminator trained with its own losses by Kar3 and by Adam, and a small residual network with batch norms as a
peer. Prints the accuracy on digits not trained on, and the mean of each block's features in units of their deviation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from attnlab.models.vision.terminator import Terminator
from attnlab.recipes.terminator import Kar3, terminator_loss, warm_cosine


class Residual(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(dim, dim, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(dim), nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self, dim: int = 12, depth: int = 4) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(1, dim, 1), nn.ModuleList(Residual(dim) for _ in range(depth))
        self.head = nn.Linear(dim, 10)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem(x)]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return maps[1:]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x)[-1].mean((2, 3)))


def terminator(image: int) -> Terminator:
    return Terminator(
        image=image, in_channels=1, factors=(12, 1, 1, 1, 2), slow=(16,) * 5, local=8, channel=8, interaction=(8, 16),
        kernels=(3, 7, 5, 5), omega=1.0,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--image", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_digits()
    x, y = torch.tensor(data.images).float()[:, None] / 8 - 1, torch.tensor(data.target)
    x = F.interpolate(x, size=arguments.image, mode="bilinear")
    steps = arguments.epochs * (1200 // 64)
    runs: tuple[tuple[str, Callable[[], nn.Module], Callable[..., torch.optim.Optimizer], float], ...] = (
        ("Terminator, Kar3", lambda: terminator(arguments.image), Kar3, 1.215e-3),
        ("Terminator, Adam", lambda: terminator(arguments.image), torch.optim.Adam, 2e-3),
        ("ResNet, Adam", ResNet, torch.optim.Adam, 2e-3),
    )
    for name, make, optimiser, rate in runs:
        torch.manual_seed(0)
        net = make()
        stepper = optimiser(net.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            stepper, lambda s: warm_cosine(s + 1, steps=steps, warm=steps // 12)
        )
        for _ in range(steps):
            at = torch.randint(0, 1200, (64,))
            stepper.zero_grad()
            logits = net(x[at])
            if isinstance(net, Terminator):
                loss = terminator_loss(net, logits, y[at])
            else:
                loss = F.cross_entropy(logits, y[at], label_smoothing=0.09)
            loss.backward()
            stepper.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            right = (net(x[1200:]).argmax(1) == y[1200:]).float().mean()
            means = [f"{(m.mean() / m.std()).abs():.2f}" for m in net.forward_features(x[1200:])]
        print(f"{name:18s} {right:.3f}   |mean| of features per block: {' '.join(means)}", flush=True)


if __name__ == "__main__":
    main()
