"""The visual analytics of vision transformers: which heads matter, how far they look, and what they draw."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.cards import LENS, Card, register
from attnlab.lens.event import Event
from attnlab.lens.importance import Progress, head_importance, joined, parts, run
from attnlab.lens.measures import patterns as drawn
from attnlab.lens.measures.patterns import Patterns
from attnlab.lens.measures.pruning import Importance
from attnlab.lens.measures.spatial import Strength, strength
from attnlab.lens.subscriber import Subscriber

_SIDE = 7  # patterns are read on a grid of at most 7×7, that of 32-pixel patches at 224


@dataclass(frozen=True, eq=False)
class Analysis:
    """What `analyse` found of L layers and H heads.

    `strength` has leading axes `(L, H)`; of `patterns`, the maps `(M, n, n)` of single images are on `grid` (pooled),
    and map i is head `heads[i]` = (layer, head) of image `images[i]`.
    """

    importance: Importance
    strength: Strength
    patterns: Patterns
    maps: Tensor
    grid: tuple[int, int]
    heads: list[tuple[int, int]]
    images: list[int]
    names: list[str]

    def figures(self, folder: str | Path) -> list[Path]:
        """Draws importance.png, strength.png and patterns.png into `folder`."""
        from attnlab.lens.figures import draw

        return draw(self, Path(folder))


@register(
    Card(
        name="vit_va",
        title="How Does Attention Work in Vision Transformers? A Visual Analytics Attempt",
        paper="2303.13731",
        system="vit_va",
        family="lens",
        kind=LENS,
        cost="L·H passes, and N² a head",
    )
)
def analyse(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    grid: tuple[int, int],
    prefix: int | None = None,
    hop: str = "chebyshev",
    renormalise: bool = False,
    mode: str = "leave_one_out",
    ablate: str = "zero",
    clusters: int = 6,
    projection: str = "pca",
    batch: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    **training: Any,
) -> Analysis:
    """Looks at every head of a trained vision transformer, in three ways (arXiv 2303.13731).

    Importance: the head is pruned, at its output, and the answer changes by so much (`measures.pruning`: jsd, d_prob,
    abs_d_pred, acc_drop, cls_cos). Strength: attention from patch to patch by hop on the grid (`measures.spatial`).
    Patterns: an autoencoder reads the maps, its codes are clustered and laid out, and each map gets the name of the
    template that it is most similar to (`measures.patterns`).

        analysis = analyse(model, images, labels, grid=(14, 14))
        analysis.importance.top(4), analysis.strength.profile("distance"), analysis.patterns.counts()

    Args:
        model: any image classifier that the tap can see; left as it was.
        images: what the model takes, `(M, channels, height, width)`; labels `(M,)` true classes.
        grid, prefix: the patches, row-major, and how many tokens come before them (the rest, if not given). Layers
            whose tokens do not lie so (windows, other scales) are left out of strength and patterns.
        hop, renormalise: as for `strength`. mode, ablate: as for `head_importance`.
        clusters, projection, seed, training: as for `patterns.find`.
        batch: images that run at a time; each layer's weights of so many are in memory.
        progress: called with passes done and to do, of the pruning.

    Cost: one pass for each head and image, and the weights once.
    """
    importance = head_importance(
        model, images, labels, mode=mode, ablate=ablate, batch=batch, progress=progress
    )  # fmt: skip
    gather = Gather(grid, prefix, hop=hop, renormalise=renormalise)
    with joined(model, gather), torch.no_grad():
        for part in parts(images, batch):
            run(model, part)
    return gather.analysis(importance, clusters=clusters, projection=projection, seed=seed, **training)


class Gather(Subscriber):
    """Sums up strength and keeps pooled maps of each image, layer by layer, as a model runs; weights are not kept."""

    def __init__(
        self, grid: tuple[int, int], prefix: int | None = None, *, hop: str = "chebyshev", renormalise: bool = False
    ) -> None:
        self.grid, self.prefix, self.hop, self.renormalise = grid, prefix, hop, renormalise
        self.small = grid
        self.strengths: dict[int, tuple[int, Strength]] = {}
        self.names: dict[int, str] = {}
        self.maps: list[tuple[int, int, Tensor]] = []  # first image, layer, (images, H, n, n)
        self.others: dict[str, int] = {}

    def after(self, event: Event, out: Tensor) -> None:
        tokens, patches = event.q.shape[2], math.prod(self.grid)
        before = tokens - patches if self.prefix is None else self.prefix
        if event.kind != "self" or event.index or before < 0 or before + patches != tokens:
            self.others[event.name] = tokens
            return
        weights = event.weights().detach().float()
        found = strength(weights, self.grid, prefix=before, hop=self.hop, renormalise=self.renormalise)
        seen, known = self.strengths.get(event.layer, (0, found))
        self.strengths[event.layer] = seen + len(weights), _mean(known, seen, found, len(weights))
        self.names[event.layer] = event.name
        pooled, self.small = drawn.pool(weights[:, :, before:, before:].flatten(0, 1), self.grid, _SIDE)
        self.maps.append((seen, event.layer, pooled.view(*weights.shape[:2], *pooled.shape[1:]).cpu()))

    def together(self) -> Strength:
        """Strength with leading axes `(L, H)`; layers with fewer heads than others cannot stand beside them."""
        if not self.strengths:
            there = ", ".join(f"{name} {n}" for name, n in self.others.items()) or "none"
            raise ValueError(f"no layer attends over a grid {self.grid}; layers and their tokens: {there}")
        each = [self.strengths[layer][1] for layer in sorted(self.strengths)]
        if len({len(s.sum) for s in each}) > 1:
            raise ValueError(f"layers have {[len(s.sum) for s in each]} heads: analyse those with as many, one by one")
        tensors = {f.name: torch.stack([getattr(s, f.name) for s in each]) for f in fields(Strength) if f.name != "hop"}
        return Strength(**tensors, hop=self.hop)

    def samples(self, most: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Maps `(M, n, n)` on the small grid, and (image, layer, head) of each; of very many, those of first images."""
        listed = [
            (first + i, layer, head, maps[i, head])
            for first, layer, maps in self.maps
            for i in range(maps.shape[0])
            for head in range(maps.shape[1])
        ]
        listed = sorted(listed, key=lambda x: x[:3])[:most]
        return torch.stack([m for *_, m in listed]), [x[:3] for x in listed]

    def analysis(self, importance: Importance, *, most: int = 4096, **keywords: Any) -> Analysis:
        """All three together."""
        found, order = self.together(), sorted(self.strengths)
        maps, where = self.samples(most)
        named = drawn.find(maps, self.small, **keywords)
        heads = [(order.index(layer), head) for _, layer, head in where]
        names = [self.names[layer] for layer in order]
        return Analysis(importance, found, named, maps, self.small, heads, [image for image, *_ in where], names)


def _mean(a: Strength, weight: int, b: Strength, other: int) -> Strength:
    """The mean over the images of both: every number in it is a mean over images."""
    share = other / (weight + other)
    means = {f.name: torch.lerp(getattr(a, f.name), getattr(b, f.name), share) for f in fields(a) if f.name != "hop"}
    return Strength(**means, hop=a.hop)
