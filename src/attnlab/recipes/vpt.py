"""Visual prompt tuning: a frozen ViT, steered by a few learned tokens among its own in every layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attnlab.cards import RECIPE, Card, register
from attnlab.models.skeletons.plain import Plain
from attnlab.models.skeletons.prompts import freeze, run_prompted


@register(
    Card(
        name="vpt",
        title="Visual Prompt Tuning",
        paper="2203.12119",
        family="prompting",
        kind=RECIPE,
        cost="(N + P)²",
    )
)
class VisualPrompts(nn.Module):
    """A frozen ViT with `length` learned tokens behind the class token, in all layers or in the first alone.

    Images → logits (B, num_classes). Trained: the prompts (layers, P, C) and the head. Source: arXiv 2203.12119.

    Args:
        backbone: a `Plain` network with a class token; becomes a part of this module.
        deep: new prompts before every layer; otherwise those of the first layer stay.
    """

    def __init__(self, backbone: Plain, *, length: int = 10, deep: bool = True) -> None:
        super().__init__()
        if backbone.class_token is None:
            raise TypeError("backbone must have a class token")
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.backbone = backbone
        freeze(backbone)
        backbone.head.requires_grad_()
        dim, layers = backbone.channels[0], len(backbone.encoder.blocks) if deep else 1
        bound = math.sqrt(6 / (3 * backbone.patch**2 + dim))
        self.prompts = nn.Parameter(torch.empty(layers, length, dim).uniform_(-bound, bound))

    def train(self, mode: bool = True) -> VisualPrompts:
        super().train(mode)
        self.backbone.eval()
        return self

    def tokens(self, images: Tensor) -> Tensor:
        """The class token and the patches (B, 1 + N, C) behind the last norm."""
        x, _ = self.backbone.embed(images)
        return self.backbone.encoder.norm(run_prompted(self.backbone.encoder.blocks, x, list(self.prompts)))

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.head(self.tokens(images)[:, 0])
