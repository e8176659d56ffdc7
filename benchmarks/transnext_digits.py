"""Larger images than in training: python benchmarks/transnext_digits.py [--steps 150]

A small TransNeXt learns scikit-learn's digits at 32×32 pixels, twice: with scores scaled by the logarithm of the number
of keys in sight (arXiv 2311.17132), and by the constant which that is in training. Printed: the accuracy on the last
third at 32×32 and at larger sizes, where the pooled map has more cells.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.models.vision.transnext import TransNeXt
from attnlab.nn.spatial.aggregated import AggregatedAttention, CosineAttention

SIZES = (32, 40, 48, 64)


def fix_scale(net: TransNeXt) -> None:
    """The scale of scores that 32×32 images have, whatever the image's size."""
    for stage in net.stages:
        for block in stage.blocks:  # type: ignore[union-attr]
            mixer = block.mixer
            (side, _), window = mixer.trained, mixer.window**2 if isinstance(mixer, AggregatedAttention) else 0
            keys = math.log(math.prod(mixer.pooled((side, side))) + window)

            def sharp(q: Tensor, _: object, mixer: CosineAttention = mixer, keys: float = keys) -> Tensor:
                return CosineAttention.sharp(mixer, q, keys)

            mixer.sharp = sharp


def run(scaled: bool, steps: int, seed: int) -> list[float]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels, split = torch.tensor(digits.target), len(digits.target) * 2 // 3

    def at(rows: Tensor | slice, size: int) -> Tensor:
        return F.interpolate(small[rows], size=(size, size), mode="bilinear")

    torch.manual_seed(seed)
    net = TransNeXt(
        dims=(24, 48), depths=(1, 2), heads=(2, 4), ratios=(4, 1), mlp_ratios=(2, 2), image=32, patch=4, in_channels=1,
        num_classes=10,
    )  # fmt: skip
    if not scaled:
        fix_scale(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 20, 0.05 + 2 * (1 - step / steps))
        rows = torch.randint(split, (64,))
        loss = F.cross_entropy(net(at(rows, 32)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        found = [net(at(slice(split, None), size)).argmax(-1) for size in SIZES]
    return [(f == labels[split:]).float().mean().item() for f in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=4)
    arguments = parser.parse_args()
    print(f"{'scale of scores':28s}" + "".join(f"{f'{s}×{s}':>10s}" for s in SIZES))
    for scaled in (True, False):
        rows = torch.tensor([run(scaled, arguments.steps, seed) for seed in range(arguments.seeds)]).mean(0)
        name = "log of the number of keys" if scaled else "as in training"
        print(f"{name:28s}" + "".join(f"{r:10.1%}" for r in rows.tolist()), flush=True)


if __name__ == "__main__":
    main()
