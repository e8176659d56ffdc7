"""What the two companions of DCAL teach: shapes of one body that differ in a part of 4×4 pixels.

    python benchmarks/dcal_parts.py [--few 5] [--much 5] [--threads 1]

An image of 24×24 pixels holds a disc of 16 pixels somewhere before a smooth ground, of varying brightness and in
noise; one of its patches carries a glyph of 4×4 pixels, and that is all by which classes differ. As in the paper a
network that has learned much is tuned to little: a ViT learns 20 random glyphs from fresh images, then ten new ones
that are one glyph but for three pixels each, from five images a class. It does so alone, one block deeper (the closer
look's parameters without its loss), with the closer look (GLCA), in pairs (PWCA), and with both (DCAL). Same images
and steps, every seed with a backbone, classes and images of its own.

Printed: the accuracy on the images learned from and on 2,000 new ones, the gap between, what each adds to the plain
network's by seed, how much more than a patch's share of the class token's rollout lies on the glyph, and how often the
glyph is among the tenth of the patches that the closer look selects (a twelfth by chance).

The second study gives the closer look all that it may want: fresh images in every step, the known glyphs in more
noise, and a network of one block, whose class token looks once.

Found on 2026-11-20, seeds 0 to 4 (mean ± deviation over seeds):

                      new            gap            rollout on the glyph   selected
    alone             0.807 ± 0.042  0.193 ± 0.042  ×6.1                   0.99
    one block deeper  0.823 ± 0.033  0.177 ± 0.033  ×5.4                   0.99
    closer look       0.808 ± 0.029  0.192 ± 0.029  ×6.2                   0.99
    in pairs          0.857 ± 0.047  0.139 ± 0.039  ×5.6                   1.00
    both              0.858 ± 0.050  0.142 ± 0.050  ×5.7                   1.00

Pairs narrow the gap in every seed, by 0.055 ± 0.025, and rollout finds the part (×1.0 in an untrained network). The
closer look adds nothing: +0.001 ± 0.018 by seed. Nor does it in the second study: alone 0.948 ± 0.015, one block deeper
0.954 ± 0.015, with the closer look 0.946 ± 0.015 (by seed −0.002 ± 0.003), rollout on the glyph ×18. There is a
reason: the class is read from the class token of its one block, and no chosen patch's output reaches that token, so
that the choice, however good, cannot change the class. What is left is one more block and one more classifier.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.models.vision.vit import ViT
from attnlab.recipes.dcal import DCAL, UncertaintyWeights, rollout

SIDE, PATCH, DIM, HEADS, DEPTH = 6, 4, 32, 4, 3
KNOWN, NEW, DIFFER, SHOTS, TESTS = 20, 10, 3, 5, 200
WAYS = {"alone": 1, "one block deeper": 1, "closer look": 2, "in pairs": 2, "both": 3}  # and their numbers of losses
Data = tuple[Tensor, Tensor, Tensor]  # images, labels, and the patch of the glyph


def draw(labels: Tensor, glyphs: Tensor, random: torch.Generator, noise: float = 0.5) -> Data:
    """One image of each label: (B, 1, 24, 24), the labels, and where the glyph is (B,)."""
    count, size = len(labels), SIDE * PATCH
    ground = F.interpolate(torch.randn(count, 1, 3, 3, generator=random), size, mode="bilinear")[:, 0]
    images = 0.7 * ground + noise * torch.randn(count, size, size, generator=random)
    corner = torch.randint(0, 3, (count, 2), generator=random)
    centre = (PATCH * corner + 7.5).T[:, :, None]
    away = ((torch.arange(size) - centre) / 8).square()  # (2, B, size)
    bright = 1.5 + 0.5 * torch.randn(count, 1, 1, generator=random)
    images = images + bright * (away[0, :, :, None] + away[1, :, None] < 1)
    row, column = (corner + torch.randint(1, 3, (count, 2), generator=random)).unbind(1)
    patches = images.view(count, SIDE, PATCH, SIDE, PATCH)
    patches[torch.arange(count), row, :, column] += glyphs[labels]
    return images[:, None], labels, SIDE * row + column


def signs(*shape: int, random: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(2, shape, generator=random) - 1


def alike(random: torch.Generator) -> Tensor:
    """Glyphs (NEW, 4, 4) that are one but for some pixels each."""
    one = signs(PATCH**2, random=random)
    where = torch.rand(NEW, PATCH**2, generator=random).topk(DIFFER).indices
    return (one * torch.ones(NEW, PATCH**2).scatter(1, where, -1.0)).view(NEW, PATCH, PATCH)


def optimiser_of(
    parameters: list[nn.Parameter], steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.OneCycleLR]:
    optimiser = torch.optim.AdamW(parameters, 2e-3, weight_decay=0.05)
    return optimiser, torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)


def learned(steps: int, glyphs: Tensor, random: torch.Generator, depth: int = DEPTH, noise: float = 0.5) -> ViT:
    """A network that knows the glyphs, from images that are new in every step."""
    net = ViT(dim=DIM, depth=depth, heads=HEADS, image=24, patch=PATCH, in_channels=1, num_classes=len(glyphs))
    nn.init.trunc_normal_(net.patches.weight, std=0.2)  # for short training
    optimiser, schedule = optimiser_of(list(net.parameters()), steps)
    for _ in range(steps):
        images, labels, _ = draw(torch.randint(len(glyphs), (64,), generator=random), glyphs, random, noise)
        loss = F.cross_entropy(net(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return net


def tuned(way: str, backbone: ViT, steps: int, images_of: Callable[[], Data], new: bool) -> DCAL:
    """The backbone taught further by one of the ways; `new` classes have a new classifier."""
    net = copy.deepcopy(backbone)
    if new:
        net.head = nn.Linear(DIM, NEW)
        nn.init.zeros_(net.head.weight)
        nn.init.zeros_(net.head.bias)
    if way == "one block deeper":
        net.encoder.blocks.append(copy.deepcopy(net.encoder.blocks[-1]))
    dcal, weigh = DCAL(net), UncertaintyWeights(WAYS[way])
    dcal.train(way in ("in pairs", "both"))
    optimiser, schedule = optimiser_of([*dcal.parameters(), *weigh.parameters()], steps)
    for _ in range(steps):
        images, labels, _ = images_of()
        if WAYS[way] == 1:
            said = [net(images)]
        else:
            found = dcal.branches(images)
            chosen = {"closer look": found[:2], "in pairs": found[::2], "both": found}[way]
            said = [branch.logits for branch in chosen if branch is not None]
        loss = weigh([F.cross_entropy(logits, labels) for logits in said])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return dcal.eval()


@torch.no_grad()
def accuracy(way: str, dcal: DCAL, data: Data) -> float:
    images, labels, _ = data
    said = dcal(images) if way in ("closer look", "both") else dcal.backbone(images)
    return (said.argmax(1) == labels).float().mean().item()


@torch.no_grad()
def sight(dcal: DCAL, data: Data) -> tuple[float, float]:
    """The rollout on the glyph's patch over a patch's share, and how often that patch is selected."""
    images, _, where = data
    _, layers = dcal.run(dcal.backbone.embed(images)[0])
    mass = rollout([(q, k) for q, k, _ in layers])[:, 1:]
    selected = (dcal.select(layers)[:, 1:] == where[:, None] + 1).any(1)
    share = mass.gather(1, where[:, None]).squeeze(1) / mass.mean(1)
    return share.mean().item(), selected.float().mean().item()


def table(rows: dict[str, list[tuple[float, ...]]], columns: str) -> None:
    print(f"\n{'mean ± deviation':17}  {columns}")
    for way, found in rows.items():
        both = zip(torch.tensor(found).mean(0).tolist(), torch.tensor(found).std(0).tolist(), strict=True)
        print(f"{way:17}  " + " ".join(f"{mean:6.3f} ± {spread:.3f}" for mean, spread in both), flush=True)


def look_again(seed: int, steps: int, rows: dict[str, list[tuple[float, ...]]]) -> None:
    """The second study, of one seed: clear images, then noisy ones, for a class token that looks once."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    glyphs = signs(KNOWN, PATCH, PATCH, random=random)
    backbone = learned(400, glyphs, random, depth=1, noise=0.3)
    many = draw(torch.arange(KNOWN).repeat(TESTS), glyphs, random, 0.6)
    for way in rows:
        again = torch.Generator().manual_seed(seed)

        def noisy(again: torch.Generator = again) -> Data:
            return draw(torch.randint(KNOWN, (64,), generator=again), glyphs, again, 0.6)

        dcal = tuned(way, backbone, steps, noisy, new=False)
        rows[way].append((accuracy(way, dcal, many), *sight(dcal, many)))
        print(f"{seed} {way:17} " + " ".join(f"{number:6.3f}" for number in rows[way][-1]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=5, help="seeds of the first study")
    parser.add_argument("--much", type=int, default=5, help="seeds of the second")
    parser.add_argument("--steps", type=int, default=600, help="of learning the known glyphs")
    parser.add_argument("--tune", type=int, default=80, help="steps of tuning to the new ones")
    parser.add_argument("--look", type=int, default=300, help="steps of the second study")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: dict[str, list[tuple[float, ...]]] = {way: [] for way in WAYS}
    for seed in range(options.few):
        torch.manual_seed(seed)
        random = torch.Generator().manual_seed(seed)
        untrained = DCAL(ViT(dim=DIM, depth=DEPTH, heads=HEADS, image=24, patch=PATCH, in_channels=1, num_classes=NEW))
        backbone = learned(options.steps, signs(KNOWN, PATCH, PATCH, random=random), random)
        glyphs = alike(random)
        few = draw(torch.arange(NEW).repeat(SHOTS), glyphs, random)
        many = draw(torch.arange(NEW).repeat(TESTS), glyphs, random)
        print("seed {}: untrained, rollout on the glyph ×{:.2f}, selected {:.2f}".format(seed, *sight(untrained, many)))
        for way in WAYS:
            dcal = tuned(way, backbone, options.tune, lambda few=few: few, new=True)
            known, new = accuracy(way, dcal, few), accuracy(way, dcal, many)
            alone = rows["alone"][seed][1] if way != "alone" else new
            rows[way].append((known, new, known - new, new - alone, *sight(dcal, many)))
            print(f"  {way:17} " + " ".join(f"{number:6.3f}" for number in rows[way][-1]), flush=True)
    if options.few > 1:
        table(rows, f"{'learned':14} {'new':14} {'gap':14} {'over alone':14} {'rollout ×':14} selected")
    rows = {way: [] for way in ("alone", "one block deeper", "closer look")}
    for seed in range(options.much):
        look_again(seed, options.look, rows)
    if options.much > 1:
        table(rows, f"{'new':14} {'rollout ×':14} selected")


if __name__ == "__main__":
    main()
