"""Where SG-Former looks: how much of its significance lies on the one object of an image, and what guiding by it gives.

    python benchmarks/sgformer_objects.py [--seeds 1 2 3] [--steps 150]

A grating of 8×8 pixels, one of four, lies somewhere on a smooth ground of 28×28. One pair of SG-Former's blocks as in
its second stage (a map of 28×28 tokens, reduction 4, windows of 7, merged in groups of 49, 14 and 7) must name the
grating at every place, so that what is seen on the object has to be carried to the rest; object and ground count
half each in training. Linear layers begin at a scale for 16 channels: the authors' 0.02 is one for hundreds. Guided by
its own significance, by a random one, and not at all: 56 regions of 2×7 places, for which it has 60 tokens otherwise.
Prints the share of places that name the grating, on 512 new images, and how many times as much of the significance lies
on a place of the object as on one of the ground.

2026-11-20, seeds 1, 2 and 3 (places that name the object; significance of the object over that of the ground):

    its own       99.5, 99.1, 99.4 %, mean 99.3      6.75, 2.42, 9.28, from 1.0 before training
    a random      98.8, 89.9, 98.7 %, mean 95.8      6.95, 5.91, 9.30
    no            99.7, 98.8, 99.9 %, mean 99.5      5.40, 7.33, 8.48

That attention comes to rest on the object shows in every seed, and a random guide is worse than its own in every seed,
though by 0.7 points in two of three. That its own is better than regions of one size, as the paper has it, does not
show: they are as good. A region of 2×7 holds enough of an object of 8×8, and the coarse map of the hybrid block already
carries a grating's name. Eight by eight pixels of digits in place of the gratings (ten classes, 200 to 250 steps, one
seed) stay at chance, 10 %, within such a training, and so say nothing.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.models.vision.sgformer import SelfGuidedPair, block, sines
from attnlab.nn.tokens.self_guided import GROUPS, GuidedAttention, HybridAttention

SIDE, OBJECT, DIM, CLASSES = 28, 8, 16, 4
GUIDES = ("its own", "a random", "no")


def scenes(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 1, 28, 28), which grating each has (B,), and which places it is at (B, 28, 28)."""
    images = 0.3 * F.interpolate(torch.randn(count, 1, 4, 4, generator=rng), size=(SIDE, SIDE), mode="bicubic")
    images = images + 0.05 * torch.randn(images.shape, generator=rng)
    labels = torch.randint(CLASSES, (count,), generator=rng)
    angles, phase = labels * math.pi / CLASSES, 2 * math.pi * torch.rand(count, generator=rng)
    y, x = torch.meshgrid(torch.arange(OBJECT), torch.arange(OBJECT), indexing="ij")
    wave = angles.cos()[:, None, None] * x + angles.sin()[:, None, None] * y
    textures = 1.5 * (1.6 * wave + phase[:, None, None]).sin()
    inside = torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    corners = torch.randint(0, SIDE - OBJECT + 1, (count, 2), generator=rng).tolist()
    for i, (top, left) in enumerate(corners):
        images[i, 0, top : top + OBJECT, left : left + OBJECT] += textures[i]
        inside[i, top : top + OBJECT, left : left + OBJECT] = True
    return images, labels, inside


def regions() -> Tensor:
    """A rank of each place (28, 28) by which those of a region of 2×7 follow each other."""
    at = torch.arange(SIDE)
    row, column = at[:, None], at[None]
    return ((row // 2 * 4 + column // 7) * 14 + row % 2 * 7 + column % 7).float()


class Namer(nn.Module):
    """Images to logits of every place, (B, 28, 28, 4); `seen` is the significance of the last call."""

    def __init__(self, guide: str) -> None:
        super().__init__()
        self.guide, self.seen = guide, torch.zeros(0)
        groups = (14, 14) if guide == "no" else GROUPS[4]
        self.embed = nn.Conv2d(1, DIM, 3, padding=1)
        self.places = nn.Parameter(0.5 * sines((SIDE, SIDE), DIM).T.reshape(1, DIM, SIDE, SIDE))
        hybrid = HybridAttention(DIM, heads=2, reduction=4, window=7)
        self.pair = SelfGuidedPair(block(DIM, hybrid), block(DIM, GuidedAttention(DIM, heads=2, groups=groups)))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, CLASSES)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.5 * module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        own = hybrid.scales

        def scales(x: Tensor, *, grid: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
            y, self.seen = own(x, grid=grid)
            if self.guide == "its own":
                return y, self.seen
            return y, torch.rand_like(self.seen) if self.guide == "a random" else regions().expand_as(self.seen)

        hybrid.scales = scales  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.pair(self.embed(x) + self.places).permute(0, 2, 3, 1)))


def run(guide: str, steps: int, seed: int) -> tuple[float, float, float]:
    """The share of places that name the object, and the contrast of significance before and after training."""
    torch.manual_seed(seed)
    net, rng = Namer(guide), torch.Generator().manual_seed(seed)
    images, wanted, inside = scenes(512, torch.Generator().manual_seed(99))

    def test() -> tuple[float, float]:
        right, on, off = [], [], []
        with torch.inference_mode():
            for x, labels, at in zip(images.split(64), wanted.split(64), inside.split(64), strict=True):
                right.append((net(x).argmax(-1) == labels[:, None, None]).float().mean())
                on.append(net.seen[at].mean())
                off.append(net.seen[~at].mean())
        return torch.stack(right).mean().item(), (torch.stack(on).mean() / torch.stack(off).mean()).item()

    before = test()[1]
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        x, labels, at = scenes(16, rng)
        losses = F.cross_entropy(net(x).permute(0, 3, 1, 2), labels[:, None, None].expand(at.shape), reduction="none")
        optimizer.zero_grad()
        (losses[at].mean() + losses[~at].mean()).mul(0.5).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    named, after = test()
    return named, before, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        for guide in GUIDES:
            named, before, after = run(guide, options.steps, seed)
            print(
                f"seed {seed}, guided by {guide} significance: {named:.1%} of places name the object; on it "
                f"{before:.2f} times the significance of the ground at first, {after:.2f} after training",
                flush=True,
            )


if __name__ == "__main__":
    main()
