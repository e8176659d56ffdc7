"""Trees that emerge: python benchmarks/dependency_shapes.py [--steps 300]

A small DependencyViT (arXiv 2304.03282, by an independent reading: no code was released) learns to tell pictures of a
disc, bright or dark, within a square or a cross, on a noisy ground. Printed, on new pictures: the accuracy with all
tokens and with pruning as in the Lite models; how often the root of an image's dependency tree lies on the object; and
how much of what was pruned is ground; each beside its share of all tokens, which is chance.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.models.vision.dependencyvit import DependencyViT

SIDE, PATCH = 32, 4


def shapes(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures `(B, 1, SIDE, SIDE)`, their classes, and which tokens the object covers by half or more."""
    g = torch.Generator().manual_seed(seed)
    line = torch.arange(SIDE) + 0.5
    outer, inner = (torch.randint(2, (count,), generator=g) for _ in range(2))
    centre = 11 + torch.rand(count, 2, generator=g) * (SIDE - 22)
    radius = 7 + torch.rand(count, generator=g) * 3

    y, x = ((line - centre[:, axis, None]).abs() for axis in (0, 1))
    y, x, radius = y[:, :, None], x[:, None], radius[:, None, None]
    square, cross = torch.maximum(y, x) < radius, (torch.maximum(y, x) < radius) & (torch.minimum(y, x) < 0.4 * radius)
    whole = torch.where(outer[:, None, None] == 0, square, cross)
    disc = y**2 + x**2 < (0.4 * radius) ** 2
    picture = 0.2 * torch.randn(count, SIDE, SIDE, generator=g) + whole
    picture = torch.where(disc, picture + 2.0 * inner[:, None, None] - 1.0, picture)
    on = F.avg_pool2d(whole.float()[:, None], PATCH).flatten(1) >= 0.5
    return picture[:, None], 2 * outer + inner, on


def train(prune: float, steps: int, seed: int) -> DependencyViT:
    torch.manual_seed(seed)
    net = DependencyViT(
        dim=48, depth=4, heads=4, image=SIDE, patch=PATCH, in_channels=1, num_classes=4, layer_scale=None, prune=prune,
        prune_after=(1, 2, 3),
    )  # fmt: skip
    x, y, _ = shapes(2000, seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, step / 20, 0.05 + 2 * (1 - step / steps))
        rows = torch.randint(len(y), (32,))
        loss = F.cross_entropy(net(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    x, y, on = shapes(300, 10_000)
    tokens = torch.arange(on.shape[1])
    for name, prune in (("all tokens", 0.0), ("pruned to 40 %", 0.2)):
        with torch.enable_grad():
            net = train(prune, arguments.steps, 0)
        accuracy = (net(x).argmax(-1) == y).float().mean()
        root = (net.tree(x) == tokens).float().argmax(-1, keepdim=True)
        line = f"{name:16s} accuracy {accuracy:6.1%}   root on the object {on.gather(1, root).float().mean():6.1%}"
        line += f" (chance {on.float().mean():.1%})"
        if prune:
            places = net.encode(net.embed(x)[0]).places
            gone = torch.ones_like(on).scatter(1, places, False)
            line += (
                f"   pruned tokens on the ground {(~on)[gone].float().mean():6.1%} (chance {(~on).float().mean():.1%})"
            )
        print(line, flush=True)


if __name__ == "__main__":
    main()
