"""What routing finds and what it costs: objects that look for their like. Bi-level routing against full attention.

    python benchmarks/biformer_objects.py [--steps 400] [--seeds 1] [--threads 2]

A scene is 28×28 tokens of noise with four objects of 4×4 tokens somewhere on its 7×7 regions: two kinds (of eight),
each twice, every one with a sign of its own, and one with a mark. A network of two attention blocks must give the sign
of the object that is like the marked one. No pooling can tell whose sign it is: the marked object's region must find
that of its like, among 49. Prints, for each number of regions that a region sees, accuracy on new scenes (half is
chance), how often the marked object's region chooses its like in either block (and chance for one block, topk/49), and
milliseconds per step of training. Full attention is topk = 49.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.nn.sparse.bilevel_routing import BilevelRouting

GRID, REGIONS, SIDE, WIDTH, KINDS = (28, 28), 7, 4, 32, 8


def scenes(count: int, looks: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `(B, N, WIDTH)`, the sign wanted `(B,)`, and the regions of the marked object and its like `(B, 2)`."""
    where = torch.rand(count, REGIONS**2, generator=random).topk(4).indices
    kinds = torch.rand(count, KINDS, generator=random).topk(2).indices.repeat_interleave(2, 1)  # a a b b
    signs = torch.randint(2, (count, 4), generator=random)
    objects = looks[kinds] + (2 * signs - 1)[..., None] * looks[KINDS]
    objects[:, 0] += looks[KINDS + 1]
    regions = 0.5 * torch.randn(count, REGIONS**2, SIDE**2, WIDTH, generator=random)
    regions[torch.arange(count)[:, None], where] += objects[:, :, None]
    maps = regions.unflatten(2, (SIDE, SIDE)).unflatten(1, (REGIONS, REGIONS)).transpose(2, 3)
    return maps.flatten(1, 4), signs[:, 1], where[:, :2]


class Network(nn.Module):
    """Two residual blocks of attention and MLP, then the largest of each channel."""

    def __init__(self, topk: int) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(BilevelRouting(WIDTH, heads=2, regions=REGIONS, topk=topk, local=0) for _ in "12")
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in "12"
        )
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x = x + mixer(self.norms[2 * i](x), grid=GRID)
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(x.amax(1))


def study(topk: int, steps: int, seed: int) -> tuple[float, float, float]:
    """Accuracy, share of marked objects whose region finds their like, seconds per step."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    looks = torch.randn(KINDS + 2, WIDTH, generator=random)
    net = Network(topk)
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    start = time.perf_counter()
    for _ in range(steps):
        x, sign, _ = scenes(32, looks, random)
        optimiser.zero_grad()
        F.cross_entropy(net(x), sign).backward()
        optimiser.step()
        schedule.step()
    seconds = (time.perf_counter() - start) / steps
    net.eval()
    chosen: list[Tensor] = []
    for mixer in net.mixers:
        assert isinstance(mixer, BilevelRouting)
        mixer.register_forward_pre_hook(
            lambda m, inputs: chosen.append(m.details(inputs[0], GRID, weights=False)[1].regions)
        )
    with torch.no_grad():
        x, sign, where = scenes(512, looks, random)
        right = (net(x).argmax(-1) == sign).float().mean().item()
    marked = torch.cat([c[torch.arange(512), where[:, 0]] for c in chosen], 1)  # (B, both blocks' choices)
    return right, (marked == where[:, 1:]).any(1).float().mean().item(), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'regions seen':<14}{'accuracy':>9}{'found':>8}{'chance':>8}{'ms per step':>13}")
    for topk in (1, 2, 4, 8, REGIONS**2):
        runs = torch.tensor([study(topk, options.steps, seed) for seed in range(options.seeds)])
        right, found, seconds = runs.mean(0).tolist()
        print(f"{topk:<14}{right:>9.1%}{found:>8.1%}{topk / REGIONS**2:>8.1%}{1e3 * seconds:>13.0f}", flush=True)


if __name__ == "__main__":
    main()
