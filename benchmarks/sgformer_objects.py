"""Where SG-Former looks: how much of its significance lies on the one object of an image, and what guiding by it gives.

    python benchmarks/sgformer_objects.py [--steps 300]

A textured square of 16×16 pixels lies somewhere on a smooth ground of 56×56. A small SG-Former, which merges the 196
tokens of its first map to 15, is trained twice to name the texture (one of eight gratings): guided by its own
significance, and by a random one. Prints how many times as much of the significance lies on a place of the object as on
one of the ground, of the coarse and of the windows' part together, before and after training, and both accuracies.
"""

from __future__ import annotations

import argparse
import math
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.models.vision.sgformer import SelfGuidedPair, SGFormer
from attnlab.nn.tokens.self_guided import HybridAttention


def scenes(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 1, 56, 56), which grating each has (B,), and which places of the map it is at (B, 14, 14)."""
    images = F.interpolate(torch.randn(count, 1, 3, 3), size=(56, 56), mode="bicubic")
    labels = torch.randint(0, 8, (count,))
    angles, phase = labels * math.pi / 8, 2 * math.pi * torch.rand(count)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    wave = angles.cos()[:, None, None] * x + angles.sin()[:, None, None] * y
    textures = (1.6 * wave + phase[:, None, None]).sin()
    inside = torch.zeros(count, 14, 14, dtype=torch.bool)
    for i, (top, left) in enumerate(torch.randint(0, 11, (count, 2)).tolist()):
        images[i, 0, 4 * top : 4 * top + 16, 4 * left : 4 * left + 16] += textures[i]
        inside[i, top : top + 4, left : left + 4] = True
    return images, labels, inside


def contrast(net: SGFormer, images: Tensor, inside: Tensor) -> float:
    """The mean significance, in the first pair, of the object's places over that of the others."""
    pair = net.stages[0].blocks[0]
    assert isinstance(pair, SelfGuidedPair)
    with torch.no_grad():
        x = pair.hybrid.norm1(net.embed(images).permute(0, 2, 3, 1))
        seen = pair.hybrid.mixer.scales(x.flatten(1, 2), grid=x.shape[1:3])[1]
    return (seen[inside].mean() / seen[~inside].mean()).item()


def at_random() -> Any:
    """While it lasts, what is significant is drawn by chance."""
    own = HybridAttention.scales

    def scales(self: HybridAttention, x: Tensor, *, grid: Any = None) -> tuple[Tensor, Tensor]:
        y, seen = own(self, x, grid=grid)
        return y, torch.rand_like(seen)

    return mock.patch.object(HybridAttention, "scales", scales)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, guide in (("its own", nullcontext), ("a random", at_random)):
        torch.manual_seed(0)
        net = SGFormer(
            dims=(16, 32), depths=(2, 1), heads=(2, 2), reductions=(2, 1), groups={2: (49, 14, 7)}, image=56,
            in_channels=1, num_classes=8,
        )  # fmt: skip
        images, wanted, inside = scenes(512)
        before = contrast(net.eval(), images, inside)
        optimizer = torch.optim.AdamW(net.train().parameters(), 3e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.steps)
        with guide():
            for _ in range(options.steps):
                x, labels, _ = scenes(32)
                loss = F.cross_entropy(net(x), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            with torch.inference_mode():
                accuracy = (net.eval()(images).argmax(1) == wanted).float().mean()
        print(
            f"guided by {name} significance: on the object {before:.2f} times that of the ground at first, "
            f"{contrast(net, images, inside):.2f} after training; accuracy {accuracy:.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
