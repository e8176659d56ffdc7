"""Where SG-Former looks: how much of its significance lies on the one object of an image, and what guiding by it gives.

    python benchmarks/sgformer_objects.py [--steps 300]

A digit of scikit-learn's, 28×28 pixels, lies somewhere on a smooth ground of 56×56. A small SG-Former, which merges the
196 tokens of its first map to 15, is trained twice to name the digit: guided by its own significance, and by a random
one. Prints the share of the significance that lies on the digit's quarter of the map, before and after training, and
both accuracies.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.models.vision.sgformer import SelfGuidedPair, SGFormer
from attnlab.nn.tokens.self_guided import HybridAttention


def place(digits: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 1, 56, 56), and which of the 14×14 places of the map are the digit's (B, 14, 14)."""
    ground = F.interpolate(torch.rand(len(digits), 1, 3, 3), size=(56, 56), mode="bicubic")
    large = F.interpolate(digits[:, None], size=(28, 28), mode="bilinear")
    inside = torch.zeros(len(digits), 14, 14, dtype=torch.bool)
    for i in range(len(digits)):
        y, x = torch.randint(0, 8, (2,)).tolist()
        ground[i, :, 4 * y : 4 * y + 28, 4 * x : 4 * x + 28] += 2 * large[i] - 0.5
        inside[i, y : y + 7, x : x + 7] = True
    return ground - 0.5, inside


def significance(net: SGFormer, images: Tensor) -> Tensor:
    """(B, 14, 14), of sum 1, of the first pair."""
    pair = net.stages[0].blocks[0]
    assert isinstance(pair, SelfGuidedPair)
    with torch.no_grad():
        x = pair.hybrid.norm1(net.embed(images).permute(0, 2, 3, 1))
        seen = pair.hybrid.mixer.scales(x.flatten(1, 2), grid=x.shape[1:3])[1]
    return seen / seen.sum((1, 2), keepdim=True)


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
    from sklearn.datasets import load_digits

    data = load_digits()
    digits = torch.tensor(data.images, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    for name, guide in (("its own", nullcontext), ("a random", at_random)):
        torch.manual_seed(0)
        net = SGFormer(
            dims=(16, 32), depths=(2, 1), heads=(2, 2), reductions=(2, 1), groups={2: (49, 14, 7)}, image=56,
            in_channels=1, num_classes=10,
        )  # fmt: skip
        images, inside = place(digits[1400:])
        before = significance(net.eval(), images)[inside].sum() / len(images)
        optimizer = torch.optim.AdamW(net.train().parameters(), 3e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.steps)
        with guide():
            for _ in range(options.steps):
                rows = torch.randint(0, 1400, (32,))
                loss = F.cross_entropy(net(place(digits[rows])[0]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            with torch.inference_mode():
                accuracy = (net.eval()(images).argmax(1) == labels[1400:]).float().mean()
        after = significance(net, images)[inside].sum() / len(images)
        print(
            f"guided by {name} significance: {before:.0%} of it on the object at first, {after:.0%} after training "
            f"(25% of the map); accuracy {accuracy:.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
