"""What the levels of focal modulation are for: accuracy by number of levels, and where the gates open.

    python benchmarks/focalnet_levels.py [--seeds 3] [--steps 400]

Scenes: one of scikit-learn's handwritten digits, twice its size, somewhere on a map with fragments of other digits as
distractors. A small FocalNet learns to name the digit with 1, 2 and 3 levels. Before training and after it: how well
the size of each level's gate tells the digit's strokes from the background (area under the curve, from 0.5: not at all,
to 1: fully, whichever of the two opens the gate wider).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.models.vision.focalnet import FocalNet

SIDE = 32
PATCH = 4


def scenes(seed: int, *, held_out: bool, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (count, 1, SIDE, SIDE), labels (count,), and where the digit's strokes are (count, SIDE, SIDE)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    glyphs = np.kron(digits.images / 16.0, np.ones((2, 2)))  # 16×16
    half = len(glyphs) * 2 // 3
    pool = np.arange(half, len(glyphs)) if held_out else np.arange(half)
    rng = np.random.default_rng(seed)
    images = np.zeros((count, SIDE, SIDE), dtype=np.float32)
    strokes = np.zeros((count, SIDE, SIDE), dtype=bool)
    labels = np.empty(count, dtype=np.int64)
    for n in range(count):
        for _ in range(4):  # fragments: 5×5 cuts of other digits
            cut = glyphs[rng.choice(pool)][6:11, 6:11]
            y, x = rng.integers(0, SIDE - 5, 2)
            images[n, y : y + 5, x : x + 5] = cut
        chosen = rng.choice(pool)
        y, x = rng.integers(0, SIDE - 16, 2)
        images[n, y : y + 16, x : x + 16] = glyphs[chosen]
        strokes[n, y : y + 16, x : x + 16] = glyphs[chosen] > 0.3
        labels[n] = digits.target[chosen]
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels), torch.from_numpy(strokes)


def trained(levels: int, seed: int, steps: int) -> tuple[FocalNet, float]:
    """A network trained for `steps` batches of 64, and its accuracy on held-out digits."""
    torch.manual_seed(seed)
    net = FocalNet(dim=32, depths=(1, 1), levels=levels, patch=PATCH, overlap=True, in_channels=1, num_classes=10)
    for module in net.modules():
        if isinstance(module, nn.Linear):  # the published 0.02 is meant for greater widths, and starts slowly here
            nn.init.xavier_uniform_(module.weight)
    images, labels, _ = scenes(seed, held_out=False, count=8000)
    optimiser = torch.optim.AdamW(net.parameters(), lr=6e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, max(steps, 1))
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        loss = F.cross_entropy(net(images[batch]), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    net.eval()
    images, labels, _ = scenes(1000 + seed, held_out=True, count=500)
    with torch.no_grad():
        return net, (net(images).argmax(1) == labels).float().mean().item()


def separation(net: FocalNet, seed: int) -> list[float]:
    """Per level of the first stage's last block: how well |gate| tells the digit's strokes from the background."""
    images, _, strokes = scenes(2000 + seed, held_out=True, count=200)
    block = net.stages[0].blocks[-1]
    found: list[Tensor] = []
    hook = block.mixer.register_forward_pre_hook(lambda mixer, inputs: found.append(mixer.gates(inputs[0])))
    with torch.no_grad():
        net(images)
    hook.remove()
    on = F.max_pool2d(strokes[:, None].float(), PATCH)[:, 0] > 0
    gates = found[0].abs().movedim(1, 0).flatten(1)
    ranks = gates.argsort(1).argsort(1).double() + 1
    strokes_count, rest = int(on.sum()), int((~on).sum())
    above = (
        ranks[:, on.flatten()].sum(1) - strokes_count * (strokes_count + 1) / 2
    )  # pairs in which the stroke is wider
    area = above / (strokes_count * rest)
    return torch.maximum(area, 1 - area).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    print("separation by the gates, per level, the global one last; mean ± spread over seeds")
    for levels in (1, 2, 3):
        for steps in (0, options.steps):
            runs = [trained(levels, seed, steps) for seed in range(options.seeds)]
            found = [separation(net, seed) for seed, (net, _) in enumerate(runs)]
            ratios = "  ".join(spread(ratio) for ratio in zip(*found, strict=True))
            accuracy = spread([accuracy for _, accuracy in runs])
            print(f"{levels} levels, {steps:>4} steps: accuracy {accuracy}   gates {ratios}", flush=True)


def spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


if __name__ == "__main__":
    main()
