"""Few-shot classes from a few images and their names: a k-NN transformer with pyramid prompts (KTPP)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import RECIPE, Card, register
from attnlab.models.skeletons.plain import Plain, TokenBlock
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.nearest_keys import NearestKeys


class PyramidPrompts(nn.Module):
    """A class's prompt gathers what its image shows, coarse to fine.

        p ← p + softmax((p Wq)(F_s Wk)ᵀ / √C) F_s Wv        for each scale s, F_s the map pooled to s×s

    p (B, C) and a map (B, C, H, W) → (B, C). Cost: O(Σ s² C²).
    """

    def __init__(self, dim: int, scales: Sequence[int] = (1, 2, 4)) -> None:
        super().__init__()
        if not scales or min(scales) < 1:
            raise ValueError(f"scales must be at least 1 each, got {tuple(scales)}")
        self.scales = tuple(scales)
        self.maps = nn.ModuleList(nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(3)) for _ in self.scales)

    def forward(self, prompt: Tensor, maps: Tensor) -> Tensor:
        for scale, layer in zip(self.scales, self.maps, strict=True):
            q, k, v = cast(nn.ModuleList, layer)
            places = F.adaptive_avg_pool2d(maps, scale).flatten(2).mT
            weights = (q(prompt)[:, None] @ k(places).mT * prompt.shape[-1] ** -0.5).softmax(-1)
            prompt = prompt + (weights @ v(places))[:, 0]
        return prompt


@register(
    Card(
        name="ktpp",
        title="KNN Transformer with Pyramid Prompts for Few-Shot Learning",
        paper="2410.10227",
        family="few-shot",
        kind=RECIPE,
        cost="N²",
    )
)
class KTPP(nn.Module):
    """Tells W new classes apart by a few support images and the texts of their names.

        Z = backbone's map as tokens → three blocks of `NearestKeys`, each with fewer keys than the one before
        support image of class c:  p = pyramid(norm(W t_c), Z),  Z' = Z ∘ σ(Wm p + b),  [p; Z'] → one block → mean of Z
        query image:  Z → the same block, without a prompt → mean
        logits (Q, W) = τ · cos(query, mean of the class's support features)        τ learned, from 10

    Texts (W, text_dim) come from a frozen text encoder, such as `CLIP.text`, and are normalised here. Stage 1 trains
    `features` under a linear layer on the base classes, stage 2 this on episodes of them (`episode`).
    Source: arXiv 2410.10227, whose text was not at hand beyond its abstract and one formula: the rest is our reading,
    and every guess is an argument.

    Args:
        backbone: images to maps, by `forward_features(images)[-1]` (B, C, H, W), with `channels`.
        keep: of the stages. alpha, context: of each `NearestKeys`. place: "append" the stages behind the backbone, or
            "replace" the attention of its last blocks, whose weights stay (a `Plain` network alone).
        scales: of the pyramid. modulate: how the prompt weighs tokens: "gate", "film" (Z ∘ (1 + γ) + β) or "token"
            (not at all but by standing among them).
        query_prompt: what stands before a query's tokens: "none", the "mean" of the W prompts, or "all" in turn, with
            one similarity for each class. readout: of a support image, "mean" of the tokens or the "prompt"'s place.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        text_dim: int = 512,
        heads: int = 8,
        keep: Sequence[float] = (0.9, 0.7, 0.5),
        alpha: float = 0.0,
        context: Literal["output", "values", "input"] = "output",
        place: Literal["append", "replace"] = "append",
        scales: Sequence[int] = (1, 2, 4),
        modulate: Literal["gate", "film", "token"] = "gate",
        query_prompt: Literal["none", "mean", "all"] = "none",
        readout: Literal["mean", "prompt"] = "mean",
    ) -> None:
        super().__init__()
        choices: dict[str, tuple[str, tuple[str, ...]]] = {
            "place": (place, ("append", "replace")),
            "modulate": (modulate, ("gate", "film", "token")),
            "query_prompt": (query_prompt, ("none", "mean", "all")),
            "readout": (readout, ("mean", "prompt")),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        if not keep or any(later > earlier for earlier, later in pairwise(keep)):
            raise ValueError(f"keep must not grow from stage to stage, got {tuple(keep)}")
        if not hasattr(backbone, "forward_features") or not hasattr(backbone, "channels"):
            raise TypeError(f"backbone must have forward_features and channels, got {type(backbone).__name__}")
        channels: Any = backbone.channels
        dim = channels[-1]

        def attention(share: float) -> NearestKeys:
            return NearestKeys(dim, heads=heads, keep=share, alpha=alpha, context=context)

        self.backbone, self.modulate, self.query_prompt, self.readout = backbone, modulate, query_prompt, readout
        self.stages = nn.ModuleList()
        if place == "append":
            self.stages.extend(TokenBlock(dim, attention(share)) for share in keep)
        else:
            if not isinstance(backbone, Plain) or len(backbone.encoder.blocks) < len(keep):
                raise TypeError(f"place='replace' wants a Plain backbone of at least {len(keep)} blocks")
            for block, share in zip(backbone.encoder.blocks[-len(keep) :], keep, strict=True):
                old = block.mixer
                if not isinstance(old, MultiHead):
                    raise TypeError(f"place='replace' wants MultiHead mixers, got {type(old).__name__}")
                block.mixer = NearestKeys(
                    dim, heads=old.heads, keep=share, alpha=alpha, context=context, bias=old.wqkv.bias is not None,
                    out_bias=old.wo.bias is not None,
                )  # fmt: skip
                block.mixer.wqkv, block.mixer.wo = old.wqkv, old.wo  # what the backbone learned stays
        self.to_prompt = nn.Sequential(nn.Linear(text_dim, dim), nn.LayerNorm(dim))
        self.pyramid = PyramidPrompts(dim, scales)
        self.weigh = None if modulate == "token" else nn.Linear(dim, dim if modulate == "gate" else 2 * dim)
        self.last = TokenBlock(dim, attention(keep[-1]))
        self.scale = nn.Parameter(torch.tensor(10.0))

    def tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, N, C) behind the stages, and their grid."""
        features: Any = self.backbone.forward_features
        maps = features(images)[-1]
        x = maps.flatten(2).mT
        for stage in self.stages:
            x = stage(x)
        return x, (maps.shape[2], maps.shape[3])

    def prompted(self, x: Tensor, grid: tuple[int, int], text: Tensor) -> Tensor:
        """Features (B, C) of tokens x (B, N, C) seen with a class's text each, (B, text_dim)."""
        prompt = self.pyramid(self.to_prompt(F.normalize(text, dim=-1)), x.mT.unflatten(2, grid))
        if self.weigh is not None:
            said = self.weigh(prompt)[:, None]
            if self.modulate == "gate":
                x = x * said.sigmoid()
            else:
                scale, shift = said.chunk(2, -1)
                x = x * (1 + scale) + shift
        x = self.last(torch.cat((prompt[:, None], x), 1))
        return x[:, 0] if self.readout == "prompt" else x[:, 1:].mean(1)

    def features(self, images: Tensor) -> Tensor:
        """Features (B, C) of images of which nothing is known."""
        return self.last(self.tokens(images)[0]).mean(1)

    def forward(self, support: Tensor, labels: Tensor, query: Tensor, texts: Tensor) -> Tensor:
        """Logits (Q, W) of query images: support images (S, …) with `labels` (S,), 0 to W − 1, texts (W, text_dim)."""
        ways = len(texts)
        if labels.shape != (len(support),) or not torch.equal(
            labels.unique(), torch.arange(ways, device=labels.device)
        ):
            raise ValueError(f"labels must name each of the {ways} classes of texts for {len(support)} support images")
        x, grid = self.tokens(support)
        known = self.prompted(x, grid, texts[labels])
        one = F.one_hot(labels, ways).to(known)
        prototypes = (one.T @ known) / one.sum(0)[:, None]
        if self.query_prompt == "none":
            return self.scale * F.normalize(self.features(query), dim=1) @ F.normalize(prototypes, dim=1).T
        x, grid = self.tokens(query)
        if self.query_prompt == "mean":
            asked = self.prompted(x, grid, F.normalize(texts, dim=1).mean(0).expand(len(x), -1))
            return self.scale * F.normalize(asked, dim=1) @ F.normalize(prototypes, dim=1).T
        every = self.prompted(x.repeat_interleave(ways, 0), grid, texts.repeat(len(x), 1)).unflatten(0, (-1, ways))
        return self.scale * F.cosine_similarity(every, prototypes, dim=-1)


class Episode(NamedTuple):
    """One few-shot task, as indices into a data set."""

    classes: Tensor  # (W,)
    support: Tensor  # (W · shots,), class by class
    query: Tensor  # (W · queries,), class by class


def episode(
    labels: Tensor, ways: int = 5, shots: int = 1, queries: int = 15, generator: torch.Generator | None = None
) -> Episode:
    """Draws `ways` classes of `labels` (M,), and of each `shots` support and `queries` query samples."""
    every = labels.unique()
    if not 1 <= ways <= len(every):
        raise ValueError(f"ways must be from 1 to {len(every)}, the classes in labels, got {ways}")
    classes = every[torch.randperm(len(every), generator=generator)[:ways]]
    support, query = [], []
    for label in classes:
        own = (labels == label).nonzero()[:, 0]
        if len(own) < shots + queries:
            raise ValueError(
                f"class {int(label)} has {len(own)} samples, fewer than shots + queries = {shots + queries}"
            )
        own = own[torch.randperm(len(own), generator=generator)]
        support.append(own[:shots])
        query.append(own[shots : shots + queries])
    return Episode(classes, torch.cat(support), torch.cat(query))


def interval(accuracies: Tensor) -> tuple[float, float]:
    """The mean over episodes, and half its 95 % interval."""
    if accuracies.ndim != 1 or len(accuracies) < 2:
        raise ValueError(f"accuracies must be (episodes,), at least 2, got {tuple(accuracies.shape)}")
    return accuracies.mean().item(), 1.96 * accuracies.std().item() / len(accuracies) ** 0.5
