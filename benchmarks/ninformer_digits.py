"""NiNformer's gate beside its parts and beside attention, on handwritten digits, at an equal number of parameters.

    python benchmarks/ninformer_digits.py [--seeds 3] [--steps 200]

The same block with (W x) ⊙ mixer(x), with W x alone (a gate of 1), with the mixer alone, and with attention; the width
of the MLP behind makes up for what each saves. Prints accuracies on digits not trained on, the mean of the seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from attnlab.models.vision.ninformer import NiNformer
from attnlab.nn.multihead import MultiHead
from attnlab.nn.tokens.mixer_gate import FeedForward, MixerBlock

DIM, HIDDEN, TOKENS = 32, 48, 16
MIXERS: dict[str, Callable[[], nn.Module] | None] = {
    "gate of a mixer": None,
    "gate of 1": lambda: nn.Linear(DIM, DIM),
    "mixer": lambda: MixerBlock(DIM, TOKENS, HIDDEN),
    "attention": lambda: MultiHead(DIM, heads=4),
}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def network(make: Callable[[], nn.Module] | None) -> NiNformer:
    net = NiNformer(image=8, patch=2, dim=DIM, hidden=HIDDEN, depth=2, in_channels=1)
    for block in net.blocks if make is not None else ():
        mixer = make()
        hidden = HIDDEN + round((parameters(block.mixer) - parameters(mixer)) / (2 * DIM + 1))
        block.mixer, block.mlp = mixer, FeedForward(DIM, hidden)
    return net


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_digits()
    x, y = torch.tensor(data.images).float()[:, None] / 8 - 1, torch.tensor(data.target)
    for name, make in MIXERS.items():
        found = []
        for seed in range(arguments.seeds):
            torch.manual_seed(seed)
            net = network(make)
            optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
            for _ in range(arguments.steps):
                at = torch.randint(0, 1200, (64,))
                optimiser.zero_grad()
                F.cross_entropy(net(x[at]), y[at]).backward()
                optimiser.step()
            net.eval()
            with torch.no_grad():
                found.append((net(x[1200:]).argmax(1) == y[1200:]).float().mean().item())
        print(f"{name:16s} {parameters(network(make)):6d} parameters {statistics.mean(found):.3f}", flush=True)


if __name__ == "__main__":
    main()
