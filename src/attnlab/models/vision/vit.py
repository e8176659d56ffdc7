"""ViT and DeiT: plain vision transformers with softmax attention over all patches."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from attnlab.cards import BACKBONE, Card, Size, register
from attnlab.models.skeletons.plain import Plain
from attnlab.nn.multihead import MultiHead


def _size(params: int, dim: int, depth: int, heads: int) -> Size:
    return Size(params, {"dim": dim, "depth": depth, "heads": heads})


# Parameters at 224² with 1,000 classes, as in timm and the papers' tables.
SIZES = {
    "vit_tiny_patch16_224": _size(5_717_416, 192, 12, 3),
    "vit_small_patch16_224": _size(22_050_664, 384, 12, 6),
    "vit_base_patch16_224": _size(86_567_656, 768, 12, 12),
    "vit_large_patch16_224": _size(304_326_632, 1024, 24, 16),
    "deit_tiny_patch16_224": _size(5_717_416, 192, 12, 3),
    "deit_small_patch16_224": _size(22_050_664, 384, 12, 6),
    "deit_base_patch16_224": _size(86_567_656, 768, 12, 12),
}


@register(
    Card(
        name="vit",
        title="An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
        paper="2010.11929",
        family="softmax",
        kind=BACKBONE,
        cost="N²",
        growth=2.0,
        sample={"dim": 16, "depth": 2, "heads": 2, "image": 32, "patch": 8, "num_classes": 10},
        sizes=SIZES,
    )
)
class ViT(Plain):
    """The vision transformer: 16×16 patches, a class token, learned positions, and attention from all to all.

    Images (B, in_channels, H, W) → logits (B, num_classes); `forward_features` gives maps. DeiT (arXiv 2012.12877) is
    the same network trained otherwise. Cost per block: 12NC² + 2N²C. Source: arXiv 2010.11929; names as in timm.

    Args:
        heads, qkv_bias: of the attention. Everything else is `Plain`'s.
    """

    def __init__(
        self, *, dim: int = 768, depth: int = 12, heads: int = 12, qkv_bias: bool = True, **plain: Any
    ) -> None:
        super().__init__(
            dim=dim,
            depth=depth,
            mixer=lambda layer: MultiHead(dim, heads=heads, bias=qkv_bias, out_bias=True),
            **{"norm": partial(nn.LayerNorm, eps=1e-6), **plain},
        )
