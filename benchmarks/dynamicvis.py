"""DynamicVis: what routing saves as images grow, and whether a router finds the objects of a scene.

    python benchmarks/dynamicvis.py [--sides 256,512] [--seeds 3] [--steps 100]

Prints the CPU time of a forward pass of the base network with ratios (8, 4, 2, 1) and with all tokens scanned. Then, on
generated dark scenes with one object on four of 256 tokens, the share of the object's tokens that is among the eighth
that each of two routers picks, before and after a classifier of boxes was trained (a router that knows nothing: 0.125).
At this size the classifier is right without the routers' help, and they do not learn to find the objects.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

import attnlab
from attnlab.models.vision.dynamicvis import DynamicVis
from attnlab.recipes.regions import RegionPretraining


def scenes(count: int, rng: torch.Generator) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    x, labels = 0.1 * torch.randn(count, 3, 64, 64, generator=rng), torch.randint(2, (count,), generator=rng)
    boxes, at = [], torch.zeros(count, 16, 16, dtype=torch.bool)
    for i, label in enumerate(labels.tolist()):
        row, column = torch.randint(15, (2,), generator=rng).tolist()
        x[i, 2 * label, 4 * row : 4 * row + 8, 4 * column : 4 * column + 8] += 1.5
        at[i, row : row + 2, column : column + 2] = True
        boxes.append(4.0 * torch.tensor([[column, row, column + 2, row + 2]]))
    return x, boxes, labels, at.flatten(1)


@torch.no_grad()
def found(net: RegionPretraining, x: Tensor, at: Tensor) -> list[float]:
    shares, backbone = [], net.backbone.eval()
    tokens = backbone.embed(x).permute(0, 2, 3, 1).flatten(1, 2)
    for block in backbone.stages[0].blocks:
        picked = torch.zeros_like(at).scatter_(1, block.mixer.route(tokens)[1], True)
        shares.append(((picked & at).sum() / at.sum()).item())
        tokens = tokens + block.mixer(tokens, grid=(16, 16))
    net.train()
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default="256,512")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for side in map(int, options.sides.split(",")):
        x, times = torch.randn(1, 3, side, side), []
        for ratios in ((8, 4, 2, 1), (1, 1, 1, 1)):
            net = attnlab.build("dynamicvis_base", ratios=ratios).eval()
            with torch.inference_mode():
                start = time.process_time()
                net(x)
                times.append(time.process_time() - start)
        print(f"{side}²: routed {times[0]:.2f} s, all tokens {times[1]:.2f} s, ratio {times[1] / times[0]:.2f}")

    for seed in range(options.seeds):
        torch.manual_seed(seed)
        rng = torch.Generator().manual_seed(seed)
        backbone = DynamicVis(dims=(8,), depths=(2,), ratios=(8,), states=2, image=64, num_classes=0)
        net = RegionPretraining(backbone, classes=2, width=16, heads=2)
        optimizer, test = torch.optim.AdamW(net.parameters(), lr=1e-2), scenes(64, rng)
        before = found(net, test[0], test[3])
        for _ in range(options.steps):
            x, boxes, labels, _ = scenes(16, rng)
            loss = net.loss(x, boxes, [labels])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after = found(net, test[0], test[3])
        accuracy = (net.eval()(test[0], test[1]).argmax(1) == test[2]).float().mean()
        shown = [", ".join(f"{share:.2f}" for share in shares) for shares in (before, after)]
        print(f"seed {seed}: found {shown[0]} before, {shown[1]} after; accuracy {accuracy:.2f}")


if __name__ == "__main__":
    main()
