"""Are the nearest keys enough, and do names help? New digits from one image each, among patches that mean nothing.

    python benchmarks/ktpp_digits.py [--episodes 120]

Trained on episodes of digits 0 to 4, tested on 5-way 1-shot episodes of 5 to 9. Each image is a digit, its 16 patches
shuffled in with as many patches of noise as a column says. Prints accuracies for full attention, for the k nearest
keys, and for these with texts, which are attributes of each digit (strokes, loops, …). About a minute on one thread.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from attnlab.recipes.ktpp import KTPP, episode, interval

# Loops, straight strokes, open arcs, corners, whether it closes above, whether it closes below.
ATTRIBUTES = torch.tensor(
    [[1, 0, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 2, 0, 0, 0], [0, 3, 0, 2, 0, 0],
     [0, 2, 1, 2, 0, 0], [1, 0, 1, 0, 0, 1], [0, 2, 0, 1, 0, 0], [2, 0, 0, 0, 1, 1], [1, 1, 0, 0, 1, 0]],
).float()  # fmt: skip


class Patches(nn.Module):
    """Images of patches in a row, each with its place: (B, 6, 1, N), four pixels and two coordinates, to a map."""

    channels = (32,)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(6, 64, 1), nn.GELU(), nn.Conv2d(64, 32, 1))

    def forward_features(self, x: Tensor) -> list[Tensor]:
        return [self.net(x)]


def patches(images: Tensor, noise: int) -> Tensor:
    """Digits (B, 8, 8) as 16 patches of 2×2 with their places, among `noise` random ones."""
    tokens = F.unfold(images[:, None], 2, stride=2)
    at = torch.linspace(-1, 1, 4)
    places = torch.stack(torch.meshgrid(at, at, indexing="ij")).flatten(1).expand(len(images), -1, -1)
    tokens = torch.cat((tokens, places), 1)
    wrong = torch.cat((torch.randn(len(images), 4, noise), 2 * torch.rand(len(images), 2, noise) - 1), 1)
    return torch.cat((tokens, wrong), 2)[:, :, None]


def run(noise: int, keep: tuple[float, ...], texts: bool, episodes: int) -> tuple[float, float]:
    torch.manual_seed(0)
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    net = KTPP(Patches(), text_dim=6, heads=4, keep=keep, scales=(1,))
    said = ATTRIBUTES if texts else torch.ones_like(ATTRIBUTES)
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3)
    known, new = (labels < 5).nonzero()[:, 0], (labels >= 5).nonzero()[:, 0]
    found = []
    for step in range(episodes + 60):
        pool = known if step < episodes else new
        drawn = episode(labels[pool], queries=8)
        support, query = pool[drawn.support], pool[drawn.query]
        truth = torch.arange(5).repeat_interleave(8)
        with torch.set_grad_enabled(step < episodes):
            logits = net(
                patches(images[support], noise), torch.arange(5), patches(images[query], noise), said[drawn.classes]
            )
        if step < episodes:
            optimiser.zero_grad()
            F.cross_entropy(logits, truth).backward()
            optimiser.step()
        else:
            found.append((logits.argmax(1) == truth).float().mean())
    return interval(torch.stack(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=120)
    options = parser.parse_args()
    print(f"{'':28}", *(f"{noise:>8} noise" for noise in (0, 16, 48)))
    for name, keep, texts in (
        ("full attention", (1.0, 1.0, 1.0), False),
        ("nearest keys", (0.9, 0.7, 0.5), False),
        ("nearest keys and texts", (0.9, 0.7, 0.5), True),
    ):
        rows = [run(noise, keep, texts, options.episodes) for noise in (0, 16, 48)]
        print(f"{name:28}", *(f"{mean:8.3f} ±{half:.3f}" for mean, half in rows), flush=True)


if __name__ == "__main__":
    main()
