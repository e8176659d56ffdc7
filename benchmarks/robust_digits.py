"""Does attention that hangs on fewer tokens hold up better? A small ViT on digits, with and without TAP and ADL.

    python benchmarks/robust_digits.py [--epochs 12] [--seeds 1]

Prints accuracy on clean test images and on three corruptions of them, the share of attention that the most looked-at
token gets, and the cosine of the attention on clean and on noisy images. About a minute on one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

import attnlab
from attnlab.recipes.robust_attention import diversity_loss, pool_tokens, recorded


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return F.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1), torch.tensor(data.target)


def salt(x: Tensor) -> Tensor:
    chance = torch.rand(x.shape[0], 1, *x.shape[2:])
    return torch.where(chance < 0.08, -1.0, torch.where(chance > 0.92, 1.0, x))


CORRUPTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "clean": lambda x: x,
    "noise": lambda x: x + 0.8 * torch.randn(x.shape),
    "blur": lambda x: F.avg_pool2d(x, 9, 1, 4, count_include_pad=False),
    "salt and pepper": salt,
}


def trained(images: Tensor, labels: Tensor, epochs: int, pooling: bool, diverse: bool) -> torch.nn.Module:
    net = attnlab.build("vit", dim=48, depth=3, heads=3, image=32, patch=4, num_classes=10, class_token=False)
    net = pool_tokens(net) if pooling else net
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(64):
            with recorded(net) as maps:
                loss = F.cross_entropy(net(images[part]), labels[part])
            optimiser.zero_grad()
            (loss + diversity_loss(maps) if diverse else loss).backward()
            optimiser.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def measured(net: torch.nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    torch.manual_seed(1)
    found, seen = [], {}
    for name, corrupt in CORRUPTIONS.items():
        with recorded(net) as maps:
            found.append((net(corrupt(images)).argmax(1) == labels).float().mean().item())
        seen[name] = torch.stack(maps).mean(2)
    clean, noisy = seen["clean"], seen["noise"]
    return [*found, clean.mean(2).amax(-1).mean().item(), F.cosine_similarity(clean, noisy, dim=-1).mean().item()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1300], order[1300:]
    print(f"{'':12}", *(f"{name:>16}" for name in (*CORRUPTIONS, "largest column", "clean to noisy")))
    for name, settings in {"plain": (False, False), "TAP": (True, False), "TAP and ADL": (True, True)}.items():
        runs = []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            runs.append(
                measured(trained(images[train], labels[train], options.epochs, *settings), images[test], labels[test])
            )
        print(f"{name:12}", *(f"{value:16.3f}" for value in torch.tensor(runs).mean(0).tolist()), flush=True)


if __name__ == "__main__":
    main()
