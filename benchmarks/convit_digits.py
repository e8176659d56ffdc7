"""What a start as a convolution buys: ConViT beside the same network with plain attention, on few and on many digits.

    python benchmarks/convit_digits.py [--steps 200] [--seeds 2]

Prints the accuracy on held-out digits after training on 5 % and on all of the rest, and how far each gated layer of
ConViT looks before and after (its non-locality, in patches).
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.models.vision.convit import ConViT
from attnlab.models.vision.vit import ViT

SHAPE = {"dim": 48, "depth": 4, "image": 16, "patch": 2, "in_channels": 1, "num_classes": 10}


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits at 16×16, and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return F.interpolate(images, scale_factor=2, mode="bilinear")[order], torch.tensor(found.target)[order]


def train(net: nn.Module, images: Tensor, labels: Tensor, steps: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        at = torch.randint(len(images), (64,), generator=rng)
        loss = F.cross_entropy(net(images[at]), labels[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def distances(net: ConViT, images: Tensor) -> list[float]:
    """How far each gated layer looks on average."""
    tokens, grid = net.embed(images)
    found = []
    for block in net.encoder.blocks[: net.local]:
        found.append(block.mixer.non_locality(block.norm1(tokens), grid=grid).mean().item())
        tokens = block(tokens, grid=grid)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images, labels = digits()
    held, rest = slice(0, 360), slice(360, None)
    print(f"{'share':>6} {'ConViT':>8} {'ViT':>8} {'gap':>8}")
    for share in (0.05, 1.0):
        count = int(len(images[rest]) * share)
        scores: dict[str, list[float]] = {"convit": [], "vit": []}
        looks = ""
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            local, plain = ConViT(**SHAPE, heads=4, local=3), ViT(**SHAPE, heads=4, qkv_bias=False)
            with torch.no_grad():
                before = distances(local, images[held][:32])
            for name, net in (("convit", local), ("vit", plain)):
                train(net, images[rest][:count], labels[rest][:count], options.steps, seed)
                with torch.no_grad():
                    scores[name].append((net(images[held]).argmax(-1) == labels[held]).float().mean().item())
            with torch.no_grad():
                after = distances(local, images[held][:32])
            looks = "  ".join(f"{b:.2f} → {a:.2f}" for b, a in zip(before, after, strict=True))
        ours, theirs = (100 * sum(s) / len(s) for s in scores.values())
        print(
            f"{share:>6.0%} {ours:>7.1f}% {theirs:>7.1f}% {ours - theirs:>+8.1f}   looks by layer: {looks}", flush=True
        )


if __name__ == "__main__":
    main()
