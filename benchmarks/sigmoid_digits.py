"""Why sigmoid attention needs its shift −log n: python benchmarks/sigmoid_digits.py

The same small vision transformer learns scikit-learn's digits with softmax, with sigmoid and the shift −log n, and with
sigmoid and no shift, whose outputs are about n/2 times larger at the start (arXiv 2409.04431). Printed: the size of the
first layer's attention output before training, the training loss on the way, and the accuracy on the last third.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F

from attnlab.models.skeletons.plain import Plain

DIM, TOKENS = 48, 64
VARIANTS: dict[str, tuple[str, dict]] = {
    "softmax": ("multihead", {}),
    "sigmoid, −log n": ("sigmoid", dict(length=TOKENS)),
    "sigmoid, no shift": ("sigmoid", dict(shift=0.0)),
}


def run(mixer: str, options: dict, steps: int, seed: int) -> list[float]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels, split = torch.tensor(digits.target), len(digits.target) * 2 // 3
    torch.manual_seed(seed)
    model = Plain(
        dim=DIM, depth=2, mixer=mixer, mixer_options={"heads": 4, **options}, image=8, patch=1, in_channels=1,
        num_classes=10, class_token=False,
    )  # fmt: skip
    sizes: list[float] = []
    hook = model.encoder.blocks[0].mixer.register_forward_hook(lambda _m, _i, y: sizes.append(y.norm(dim=-1).mean()))
    with torch.no_grad():
        model(images[:64])
    hook.remove()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 20, 0.05 + 2 * (1 - step / steps))
        rows = torch.randint(split, (64,))
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[split:]).argmax(-1) == labels[split:]).float().mean()
    early = slice(steps // 10, steps // 5)
    return [float(sizes[0]), float(np.mean(losses[early])), float(np.mean(losses[-steps // 10 :])), float(accuracy)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{'':20s}{'output at start':>18s}{'early loss':>12s}{'last loss':>12s}{'accuracy':>16s}")
    base = None
    for name, (mixer, options) in VARIANTS.items():
        rows = np.array([run(mixer, options, arguments.steps, seed) for seed in range(arguments.seeds)])
        size, early, last, accuracy = rows.mean(0)
        base = size if base is None else base
        print(
            f"{name:20s}{size:9.3f} ({size / base:4.1f}×){early:12.3f}{last:12.3f}"
            f"{accuracy:10.1%} ± {rows[:, 3].std():.1%}", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
