"""What a channel gate is worth, and what it costs: a small CNN on scikit-learn's digits, with and without gates.

    python benchmarks/eca_digits.py [--seeds 5] [--steps 150]

Gates: none, squeeze-excitation (a bottleneck of a quarter), ECA of kernel 1 (each channel alone), 3 and 5,
and the ablation with weights per channel. Accuracy is on the last third of the digits.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.models.skeletons.parts import ConvNorm
from attnlab.nn.channel.eca import EfficientChannelAttention

WIDTHS = (32, 64, 64)


class SqueezeExcitation(nn.Module):
    """The bottleneck gate that ECA replaces (arXiv 1709.01507), for comparison."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, dim // 4), nn.Linear(dim // 4, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(x.mean((2, 3))).relu()).sigmoid()[..., None, None]


GATES: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda dim: nn.Identity(),
    "SE": SqueezeExcitation,
    "ECA, kernel 1": lambda dim: EfficientChannelAttention(dim, kernel=1),
    "ECA, kernel 3": lambda dim: EfficientChannelAttention(dim, kernel=3),
    "ECA, kernel 5": lambda dim: EfficientChannelAttention(dim, kernel=5),
    "ECA-NS, kernel 3": lambda dim: EfficientChannelAttention(dim, kernel=3, shared=False),
}


def network(gate: Callable[[int], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, dim in enumerate(WIDTHS):
        before = WIDTHS[i - 1] if i else 1
        layers += [ConvNorm(before, dim, 3, 1 if i == 0 else 2, activation=nn.ReLU()), gate(dim)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], 10))


def accuracy(gate: Callable[[int], nn.Module], seed: int, steps: int) -> float:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    split = len(images) * 2 // 3
    torch.manual_seed(seed)
    net = network(gate)
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps)
    for _ in range(steps):
        batch = torch.randint(split, (64,))
        loss = F.cross_entropy(net(images[batch]), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        return (net(images[split:]).argmax(1) == labels[split:]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    plain = sum(p.numel() for p in network(GATES["none"]).parameters())
    print(f"gate               weights added to {plain:,}   accuracy (mean ± spread over {options.seeds} seeds)")
    for name, gate in GATES.items():
        added = sum(p.numel() for p in network(gate).parameters()) - plain
        found = [accuracy(gate, seed, options.steps) for seed in range(options.seeds)]
        deviation = statistics.stdev(found) if len(found) > 1 else 0.0
        print(f"{name:<18} {added:>10,}                {statistics.mean(found):.4f} ± {deviation:.4f}", flush=True)


if __name__ == "__main__":
    main()
