"""Is linear attention flat, and does local concentration mend it? L²ViT's claim on small pictures of textures.

    python benchmarks/l2vit_focus.py [--steps 60] [--seeds 2]

Trains three small pyramids of global blocks on brick, grass and gravel: clamped linear attention with and without local
concentration, and softmax attention. Prints accuracy on held-out views, and the entropy of the attention rows of the
last block beside log N, that of rows that look everywhere alike.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.models.vision.l2vit import GLOBAL, GlobalBlock, L2ViT
from attnlab.nn.multihead import MultiHead

SHAPE = {"dims": (32, 48), "depths": (1, 2), "heads": (2, 3), "blocks": (GLOBAL,), "in_channels": 1, "num_classes": 3}


def views(rng: torch.Generator, count: int, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Noisy 32×32 views of the columns `first` to `last` of three photographs, of mean 0 and deviation 1."""
    from skimage import data

    photographs = [torch.tensor(getattr(data, name)(), dtype=torch.float32) for name in ("brick", "grass", "gravel")]
    labels = torch.randint(3, (count,), generator=rng)
    rows = torch.randint(512 - 32, (count,), generator=rng)
    columns = first + torch.randint(last - first - 32, (count,), generator=rng)
    cut = [photographs[k][r : r + 32, c : c + 32] for k, r, c in zip(labels, rows, columns, strict=True)]
    maps = torch.stack(cut)[:, None]
    maps = (maps - maps.mean((2, 3), keepdim=True)) / maps.std((2, 3), keepdim=True)
    return maps + 0.7 * torch.randn(maps.shape, generator=rng), labels


def build(kind: str) -> L2ViT:
    net = L2ViT(**SHAPE, concentrate=kind == "linear + concentration")
    if kind == "softmax":
        for block in net.modules():
            if isinstance(block, GlobalBlock):
                block.mixer = MultiHead(block.mixer.dim, heads=block.mixer.heads, bias=True)
    return net


def entropy(net: nn.Module, x: Tensor) -> tuple[float, float]:
    """Of the rows of the last block's attention, as shares of a sum of 1, and log N."""
    seen: list[Tensor] = []
    mixer = net.stages[-1].blocks[-1].mixer
    handle = mixer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(x)
    handle.remove()
    rows = mixer.weights(seen[0])
    rows = rows / rows.sum(-1, keepdim=True).clamp(min=1e-12)
    return -(rows * rows.clamp(min=1e-12).log()).sum(-1).mean().item(), math.log(rows.shape[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for kind in ("linear", "linear + concentration", "softmax"):
        scores, found = [], (0.0, 0.0)
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            net, rng = build(kind), torch.Generator().manual_seed(seed)
            optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.steps)
            for _ in range(options.steps):
                x, labels = views(rng, 32, 0, 384)
                loss = F.cross_entropy(net(x), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            x, labels = views(torch.Generator().manual_seed(99), 256, 384, 512)
            with torch.no_grad():
                scores.append((net.eval()(x).argmax(-1) == labels).float().mean().item())
                found = entropy(net, x[:32])
        accuracy = 100 * sum(scores) / len(scores)
        print(f"{kind:<23} {accuracy:>5.1f} % right, entropy {found[0]:.2f} of {found[1]:.2f}", flush=True)


if __name__ == "__main__":
    main()
