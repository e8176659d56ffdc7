"""What EViT keeps: digits lost in noise, the patches that stay, the accuracy by keep rate, and the time saved.

    python benchmarks/evit_digits.py [--steps 1000] [--seconds 2]

A digit of scikit-learn's, 16×16 pixels, lies somewhere in an image of 32×32 pixels of noise. A small EViT is trained on
them with its shrinking keep rate. Prints how many of the digit's patches are still there behind the last block beside
the share of all patches that is, the accuracy by keep rate, with the class token's choice and with a random one of as
many, and DeiT-S's time over EViT-S's beside what their numbers of operations promise.
"""

from __future__ import annotations

import argparse
import time
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import attnlab
from attnlab.cost import count_flops
from attnlab.models.vision import evit
from attnlab.recipes.evit import keep_rate


def hide(digits: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 1, 32, 32) with a digit in the noise, and which of the 4×4 patches hold some of it (B, 16)."""
    images = 0.3 * torch.rand(len(digits), 1, 32, 32)
    mask = torch.zeros(len(digits), 32, 32)
    for i, digit in enumerate(digits):
        y, x = (8 * torch.randint(0, 3, (2,))).tolist()
        large = digit.repeat_interleave(2, 0).repeat_interleave(2, 1)
        images[i, 0, y : y + 16, x : x + 16] = large
        mask[i, y : y + 16, x : x + 16] = (large > 0.2).float()
    return 3 * images - 0.6, F.max_pool2d(mask[:, None], 8).flatten(1) > 0


def accuracy(net: evit.EViT, images: Tensor, labels: Tensor, keep: float) -> float:
    with torch.inference_mode():
        return (net(images, keep=keep).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    from sklearn.datasets import load_digits

    data = load_digits()
    digits = torch.tensor(data.images, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    net = evit.EViT(
        dim=64, depth=4, heads=4, image=32, patch=8, in_channels=1, num_classes=10, keep=0.5, drop_at=(1, 2)
    )
    torch.nn.init.trunc_normal_(net.patches.weight, std=0.2)  # for short training
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.steps)
    train = 1400
    for step in range(options.steps):
        rows = torch.randint(0, train, (32,))
        rate = keep_rate(step, start=options.steps // 3, end=2 * options.steps // 3, base=0.5)
        loss = F.cross_entropy(net(hide(digits[rows])[0], keep=rate), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    images, held = hide(digits[train:])
    with torch.inference_mode():
        out = net.encode(net.embed(images)[0])
    there = torch.zeros(len(images), 17).scatter(1, out.origins, 1.0)[:, :16]
    of_digit = (there * held).sum() / held.sum()
    print(f"after the last block: {of_digit:.0%} of the digit's patches, {there.mean():.0%} of all patches")
    print(f"{'keep':>6} {'class token':>12} {'random':>8}")
    for keep in (1.0, 0.75, 0.5, 0.25):
        chosen = accuracy(net, images, labels[train:], keep)
        with mock.patch.object(evit, "class_attention", lambda q, k: torch.rand(len(q), q.shape[2] - 1) / q.shape[2]):
            anyhow = accuracy(net, images, labels[train:], keep)
        print(f"{keep:>6} {chosen:>12.1%} {anyhow:>8.1%}")
    nets = [attnlab.build("deit_small_patch16_224").eval(), attnlab.build("evit_small").eval()]
    x, best = torch.randn(1, 3, 224, 224), [float("inf")] * 2
    begin = time.perf_counter()
    with torch.inference_mode():
        flops = [count_flops(model, x) for model in nets]
        while time.perf_counter() - begin < options.seconds:
            for i, model in enumerate(nets):
                start = time.perf_counter()
                model(x)
                best[i] = min(best[i], time.perf_counter() - start)
    print(f"DeiT-S over EViT-S at keep 0.7: time {best[0] / best[1]:.2f}×, operations {flops[0] / flops[1]:.2f}×")


if __name__ == "__main__":
    main()
