"""Are the nearest keys enough, and do names help? New digits from one image each, among patches that mean nothing.

    python benchmarks/ktpp_digits.py [--episodes 250] [--seeds 2]

Trained on episodes of digits 0 to 4 with four patches of noise beside the 16 of each digit, tested on 5-way 1-shot
episodes of 5 to 9 with as many as a column says. Prints accuracies for full attention, for the nearest keys, and for
these with texts, which are attributes of each digit (strokes, loops, …). A minute on one thread.
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
NOISE = (0, 4, 16, 48)


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


def run(keep: tuple[float, ...], texts: bool, episodes: int, seed: int) -> list[float]:
    torch.manual_seed(seed)
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    known, new = (labels < 5).nonzero()[:, 0], (labels >= 5).nonzero()[:, 0]
    said, truth = ATTRIBUTES if texts else torch.ones_like(ATTRIBUTES), torch.arange(5).repeat_interleave(8)
    net = KTPP(Patches(), text_dim=6, heads=4, keep=keep, scales=(1,))
    optimiser = torch.optim.AdamW(net.parameters(), lr=5e-4)

    def logits(pool: Tensor, noise: int) -> Tensor:
        drawn = episode(labels[pool], queries=8)
        support, query = (patches(images[pool[part]], noise) for part in (drawn.support, drawn.query))
        return net(support, torch.arange(5), query, said[drawn.classes])

    for _ in range(episodes):
        optimiser.zero_grad()
        F.cross_entropy(logits(known, 4), truth).backward()
        optimiser.step()
    with torch.no_grad():
        return [
            interval(torch.stack([(logits(new, noise).argmax(1) == truth).float().mean() for _ in range(60)]))[0]
            for noise in NOISE
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    print(f"{'':24}", *(f"{noise:>6} noise" for noise in NOISE))
    for name, keep, texts in (
        ("full attention", (1.0, 1.0, 1.0), False),
        ("nearest keys", (0.9, 0.7, 0.5), False),
        ("nearest keys and texts", (0.9, 0.7, 0.5), True),
    ):
        rows = torch.tensor([run(keep, texts, options.episodes, seed) for seed in range(options.seeds)])
        print(f"{name:24}", *(f"{mean:12.3f}" for mean in rows.mean(0).tolist()), flush=True)


if __name__ == "__main__":
    main()
