"""What MambaOut claims, on small data: seeing everything suits images, and a state space pays on long recall alone.

    python benchmarks/mambaout_claims.py [--seeds 2]

1. The criterion of length for common networks. 2. A small ViT on digits that sees everything, and one that sees only
what comes before. 3. Gated CNN with and without a state space (a learned decaying sum) on digits, and on recalling the
first symbol of a sequence at its end. Prints accuracies on data not trained on, the mean of the seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from attnlab.lens.long_sequence import long_sequence
from attnlab.models.skeletons.plain import Plain
from attnlab.models.vision.mambaout import GatedBlock
from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.gated_cnn import GatedCNN

TASKS = (("ViT-S, classification at 224", 196, 384), ("ViT-B, classification at 224", 196, 768))
TASKS += (("ViT-S, detection at 800×1280", 4000, 384), ("ViT-B, segmentation at 512×2048", 4096, 768))
DIM, LENGTH, SYMBOLS = 32, 96, 8


class GatedSSM(GatedCNN):
    """The gated CNN whose input also goes through h_t = e^(-decay) h_{t-1} + x_t, in raster order, per channel."""

    def __init__(self, dim: int, *, kernel: int = 3) -> None:
        super().__init__(dim, kernel=kernel)
        self.decay = nn.Parameter(torch.linspace(-6, 0, dim))
        self.read = nn.Parameter(torch.full((dim,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        at = torch.arange(tokens.shape[2], device=x.device)
        weights = (-F.softplus(self.decay)[:, None, None] * (at[:, None] - at).clamp(min=0)).exp().tril()
        past = torch.einsum("cij,bcj->bci", weights, tokens)
        return super().forward(x + self.read[:, None, None] * past.reshape(x.shape))


class Gated(nn.Module):
    """Two gated blocks between an embedding and a head, reading the mean of all places or the last one."""

    def __init__(self, embed: nn.Module, mixer: Callable[..., GatedCNN], classes: int, *, last: bool) -> None:
        super().__init__()
        self.embed, self.last = embed, last
        self.blocks = nn.Sequential(*(GatedBlock(DIM, mixer(DIM, kernel=3)) for _ in range(2)))
        self.head = nn.Linear(DIM, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.blocks(x if x.ndim == 4 else x.mT.unsqueeze(2))  # a sequence is a map one place high
        return self.head(x[:, :, -1, -1] if self.last else x.mean((2, 3)))


def accuracy(
    net: nn.Module, draw: Callable[[], tuple[Tensor, Tensor]], test: tuple[Tensor, Tensor], steps: int
) -> float:
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(steps):
        x, y = draw()
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    net.eval()
    with torch.no_grad():
        return (net(test[0]).argmax(1) == test[1]).float().mean().item()


def digits() -> tuple[Callable[[], tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    data = load_digits()
    x, y = torch.tensor(data.images).float()[:, None] / 8 - 1, torch.tensor(data.target)

    def draw() -> tuple[Tensor, Tensor]:
        at = torch.randint(0, 1200, (64,))
        return x[at], y[at]

    return draw, (x[1200:], y[1200:])


def recall(batch: int = 64) -> tuple[Tensor, Tensor]:
    """Sequences of symbols 8-15 behind one of 0-7, which is the answer."""
    x = torch.randint(SYMBOLS, 2 * SYMBOLS, (batch, LENGTH))
    x[:, 0] = torch.randint(0, SYMBOLS, (batch,))
    return x, x[:, 0]


def mean(seeds: int, run: Callable[[], float]) -> float:
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        found.append(run())
    return statistics.mean(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    seeds, steps = arguments.seeds, arguments.steps
    torch.set_num_threads(1)
    for task, tokens, dim in TASKS:
        found = long_sequence(tokens, dim)
        print(f"{task:32s} {tokens:5d} tokens, long from {found.threshold}: {'long' if found.long else 'short'}")

    draw, test = digits()

    def vit(causal: bool) -> float:
        net = Plain(
            dim=DIM, depth=2, mixer=lambda _: MultiHead(DIM, heads=4, causal=causal), image=8, patch=2, in_channels=1,
            num_classes=10, class_token=False,
        )  # fmt: skip
        return accuracy(net, draw, test, steps)

    for name, causal in (("everything", False), ("what came before", True)):
        print(f"ViT on digits, sees {name:18s} {mean(seeds, lambda c=causal: vit(c)):.3f}")
    for name, mixer in (("gated CNN", GatedCNN), ("gated CNN and SSM", GatedSSM)):
        seen = mean(
            seeds, lambda m=mixer: accuracy(Gated(nn.Conv2d(1, DIM, 1), m, 10, last=False), draw, test, steps // 3)
        )
        told = mean(
            seeds,
            lambda m=mixer: accuracy(
                Gated(nn.Embedding(2 * SYMBOLS, DIM), m, SYMBOLS, last=True), recall, recall(500), steps // 3
            ),
        )
        print(f"{name:18s} digits {seen:.3f}   recall over {LENGTH} {told:.3f} (chance {1 / SYMBOLS:.3f})")


if __name__ == "__main__":
    main()
