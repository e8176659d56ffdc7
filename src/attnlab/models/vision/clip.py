"""CLIP: an image tower and a text tower that meet in one space, and take prompts in any layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import OPERATOR, Card, Size, register
from attnlab.models.skeletons.plain import Encoder, Plain, TokenBlock
from attnlab.models.skeletons.prompts import run_prompted
from attnlab.nn.multihead import MultiHead


class QuickGELU(nn.Module):
    """x σ(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()


def _quick(encoder: Encoder) -> None:
    for block in encoder.blocks:
        cast(nn.Module, cast(TokenBlock, block).mlp).act = QuickGELU()


class ImageTower(Plain):
    """A plain ViT with a norm before its first block: images (B, 3, H, W) → (B, out_dim)."""

    def __init__(self, *, dim: int, heads: int, out_dim: int, **plain: Any) -> None:
        super().__init__(
            dim=dim, mixer=lambda layer: MultiHead(dim, heads=heads, bias=True), num_classes=out_dim, **plain
        )
        self.patches = nn.Conv2d(self.in_channels, dim, self.patch, self.patch, bias=False)
        self.norm_pre = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, out_dim, bias=False)
        _quick(self.encoder)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        tokens, grid = super().embed(x)
        return self.norm_pre(tokens), grid

    def forward(self, x: Tensor, prompts: Sequence[Tensor | None] = ()) -> Tensor:
        """`prompts`, one (P, dim) per layer or None, stand behind the patches."""
        tokens, _ = self.embed(x)
        first = [self.norm_pre(p) if p is not None else None for p in prompts[:1]]
        tokens = run_prompted(self.encoder.blocks, tokens, [*first, *prompts[1:]], at=tokens.shape[1])
        return self.head(self.encoder.norm(tokens[:, 0]))


class TextTower(nn.Module):
    """A causal transformer: token ids (B, N) → (B, out_dim), read at the end of the text, its largest id."""

    def __init__(self, *, dim: int, depth: int, heads: int, out_dim: int, words: int, length: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, dim)
        self.positions = nn.Parameter(0.01 * torch.randn(length, dim))
        self.encoder = Encoder(
            dim=dim, depth=depth, mixer=lambda layer: MultiHead(dim, heads=heads, bias=True, causal=True)
        )
        self.head = nn.Linear(dim, out_dim, bias=False)
        nn.init.normal_(self.words.weight, std=0.02)
        _quick(self.encoder)

    def forward(self, ids: Tensor, prompts: Sequence[Tensor | None] = ()) -> Tensor:
        """`prompts`, one per layer or None, replace the words behind the first; those of layer 0 (P, dim) or (B, P,
        dim) get positions as words do."""
        if ids.ndim != 2 or ids.shape[1] > len(self.positions):
            raise ValueError(f"ids must be (B, N), N up to {len(self.positions)}, got {tuple(ids.shape)}")
        x, held = self.words(ids), 0
        if prompts and prompts[0] is not None:
            held = prompts[0].shape[-2]
            x = torch.cat((x[:, :1], prompts[0].expand(len(x), -1, -1), x[:, 1 + held :]), 1)
        elif any(p is not None for p in prompts):
            raise ValueError("prompts must begin in layer 0: the words that later ones replace are not said otherwise")
        x = x + self.positions[: ids.shape[1]]
        x = run_prompted(self.encoder.blocks, x, [None, *prompts[1:]], at=1, held=held)
        return self.head(self.encoder.norm(x[torch.arange(len(x), device=x.device), ids.argmax(1)]))


# Parameters of the authors' checkpoint.
SIZES = {"clip_vit_base_patch16": Size(149_620_737)}


@register(
    Card(
        name="clip",
        title="Learning Transferable Visual Models From Natural Language Supervision",
        paper="2103.00020",
        family="softmax",
        kind=OPERATOR,
        cost="N²",
        growth=2.0,
        sizes=SIZES,
    )
)
class CLIP(nn.Module):
    """Images and texts in one space: logits (B, K) = exp(logit_scale) · cos(image(images), text(ids)).

    Images (B, 3, H, W) and token ids (K, N) of your tokeniser. Both towers take `prompts` per layer, which is what
    prompt tuning learns (`recipes.maple`). Source: arXiv 2103.00020; the defaults are ViT-B/16's.

    Args:
        dim, depth, heads, image, patch: of the image tower. text_dim, text_depth, text_heads, words, length: of the
            text tower, words being the size of the vocabulary. out_dim: of the space in which they meet.
    """

    def __init__(
        self,
        *,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        image: int = 224,
        patch: int = 16,
        text_dim: int = 512,
        text_depth: int = 12,
        text_heads: int = 8,
        words: int = 49408,
        length: int = 77,
        out_dim: int = 512,
    ) -> None:
        super().__init__()
        self.image = ImageTower(dim=dim, depth=depth, heads=heads, image=image, patch=patch, out_dim=out_dim)
        self.text = TextTower(
            dim=text_dim, depth=text_depth, heads=text_heads, words=words, length=length, out_dim=out_dim
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        seen, said = F.normalize(self.image(images), dim=1), F.normalize(self.text(ids), dim=1)
        return self.logit_scale.exp() * seen @ said.T
