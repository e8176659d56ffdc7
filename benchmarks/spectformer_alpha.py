"""How many layers should filter frequencies before the others attend? SpectFormer's alpha on digits.

    python benchmarks/spectformer_alpha.py [--steps 120] [--seeds 2] [--depth 4]

Trains plain SpectFormers on scikit-learn's digits with every alpha from 0 (attention alone) to all layers, and prints
accuracy on held-out digits, as they are, blurred and with noise of high frequency; and how much of the first learned
filter's gain lies in the lower half of the frequencies.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.models.vision.spectformer import VanillaSpectFormer


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    return images[order], torch.tensor(found.target)[order]


def low_gain(net: VanillaSpectFormer) -> float:
    """The mean gain at frequencies up to a quarter per pixel, over the mean gain above."""
    gain = torch.view_as_complex(net.encoder.blocks[0].mixer.filter.detach()).abs().mean(-1)
    height, width = gain.shape[0], 2 * (gain.shape[1] - 1)
    rows = torch.fft.fftfreq(height).abs()[:, None]
    low = torch.maximum(rows, torch.fft.rfftfreq(width)[None]) <= 0.25
    return (gain[low].mean() / gain[~low].mean()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images, labels = digits()
    held = slice(0, 360)
    waves = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    tests = {
        "plain": images[held],
        "blurred": F.avg_pool2d(F.pad(images[held], (1, 1, 1, 1), value=-1.0), 3, 1),
        "noisy": images[held] + 0.7 * waves * torch.randn(360, 1, 1, 1, generator=torch.Generator().manual_seed(1)),
    }
    print(f"{'alpha':>5} " + " ".join(f"{name:>8}" for name in tests) + "   gain, low / high")
    for alpha in range(options.depth + 1):
        scores, gain = dict.fromkeys(tests, 0.0), 0.0
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            net = VanillaSpectFormer(
                dim=48, depth=options.depth, heads=4, spectral=alpha, mlp_ratio=2.0, image=8, patch=1, in_channels=1,
                num_classes=10,
            )  # fmt: skip
            optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.steps)
            for _ in range(options.steps):
                at = torch.randint(360, len(images), (48,))
                loss = F.cross_entropy(net(images[at]), labels[at])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                for name, x in tests.items():
                    right = (net.eval()(x).argmax(-1) == labels[held]).float().mean().item()
                    scores[name] += 100 * right / options.seeds
            gain += low_gain(net) / options.seeds if alpha else 0.0
        row = " ".join(f"{score:>7.1f}%" for score in scores.values())
        print(f"{alpha:>5} {row}   {gain:.2f}" if alpha else f"{alpha:>5} {row}", flush=True)


if __name__ == "__main__":
    main()
