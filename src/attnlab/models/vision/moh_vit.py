"""MoH-ViT: TransNeXt, of whose heads each token takes some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.vision.transnext import BASE, SMALL, TransNeXt

# Parameters with 1,000 classes and heads per stage as in the authors' code, by the share of heads in use, in percent.
SIZES = {
    "moh_vit_small_80": Size(49_910_548, {**SMALL, "shared": (3, 6, 3, 8), "routed": (0, 0, 6, 12), "drop_path": 0.45}),
    "moh_vit_small_75": Size(49_910_548, {**SMALL, "shared": (3, 6, 3, 4), "routed": (0, 0, 6, 12), "drop_path": 0.45}),
    "moh_vit_base_75": Size(90_020_632, {**BASE, "shared": (4, 8, 4, 5), "routed": (0, 0, 8, 16), "drop_path": 0.6}),
    "moh_vit_base_50": Size(90_023_512, {**BASE, "shared": (2, 2, 2, 4), "routed": (2, 4, 6, 8), "drop_path": 0.6}),
}


@register(
    Card(
        name="moh_vit",
        title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
        paper="2410.11842",
        system="moh",
        family="softmax",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N (9 + N/r²)",
        sample={
            "dims": (16, 24), "depths": (1, 1), "heads": (4, 4), "shared": (2, 1), "routed": (1, 2), "ratios": (2, 1),
            "mlp_ratios": (2, 2), "image": 32, "num_classes": 10,
        },
        probe=(32, 24),
        sizes=SIZES,
    )
)  # fmt: skip
class MoHViT(TransNeXt):
    """A TransNeXt in which each token takes `shared` heads always and the `routed` best of the others.

        head outputs × gates (`HeadRouter`), before each layer's output projection

    Images `(B, in_channels, H, W)` of any size to logits `(B, num_classes)`. Train inside
    `attnlab.recipes.moh.balanced`, or few heads win. Source: arXiv 2410.11842 (SkyworkAI/MoH).

    Args:
        shared, routed: heads per stage; all of a stage's may be shared.
        Others as for `TransNeXt`.
    """

    def __init__(
        self, *, shared: Sequence[int] = (3, 6, 3, 8), routed: Sequence[int] = (0, 0, 6, 12), **keywords: Any
    ) -> None:
        super().__init__(shared=shared, routed=routed, **keywords)
