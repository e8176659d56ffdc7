"""Prompts that each token picks against prompts that all share, at one number of parameters, on digits.

    python benchmarks/tcpa_digits.py [--steps 150]

The backbone is a small ViT with random weights, frozen. Prints test accuracy, and the mean cosine of patches' features
with each other: the lower, the more they differ. About a minute on one thread.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import attnlab
from attnlab.recipes.tcpa import TCPA
from attnlab.recipes.vpt import VisualPrompts


def alike(tokens: Tensor) -> float:
    """The mean cosine of two patches of one image."""
    unit = F.normalize(tokens[:, 1:], dim=-1)
    count = unit.shape[1]
    return (((unit.sum(1) ** 2).sum(-1) - count) / (count * (count - 1))).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
    labels = torch.tensor(data.target)
    train, test = slice(0, 1300), slice(1300, None)
    for name in ("shared", "picked"):
        torch.manual_seed(0)
        vit = attnlab.build("vit", dim=48, depth=4, heads=3, image=8, patch=2, num_classes=10)
        for p in vit.encoder.parameters():
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)  # louder than a fresh network's, so that attention does something
        if name == "shared":
            net: nn.Module = VisualPrompts(vit, length=24)
        else:
            net = TCPA(vit, sizes=(6, 6), picks=(3, 3), dropout=0.0)
        trained = [p for p in net.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.1)
        for _ in range(options.steps):
            part = torch.randint(0, 1300, (64,))
            out = net(images[train][part])
            logits, distance = out if isinstance(out, tuple) else (out, torch.zeros(()))
            optimiser.zero_grad()
            (F.cross_entropy(logits, labels[part]) + 0.01 * distance).backward()
            optimiser.step()
        net.eval()
        with torch.no_grad():
            tokens = net.tokens(images[test])
            tokens = tokens[0] if isinstance(tokens, tuple) else tokens
            accuracy = (vit.head(tokens[:, 0]).argmax(1) == labels[test]).float().mean().item()
        count = sum(p.numel() for p in trained)
        print(f"{name:7} {count} parameters   accuracy {accuracy:.3f}   patches alike {alike(tokens):.3f}", flush=True)


if __name__ == "__main__":
    main()
