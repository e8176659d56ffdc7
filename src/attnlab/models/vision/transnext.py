"""TransNeXt: a pyramid that sees a window around each token sharply and the whole image coarsely, like an eye."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.convglu import ConvGLU
from attnlab.models.skeletons.parts import ChannelNorm, Downsample
from attnlab.models.skeletons.pyramid import Block, Place, Pyramid
from attnlab.nn.spatial.aggregated import AggregatedAttention, CosineAttention

SMALL: dict[str, Any] = {"dims": (72, 144, 288, 576), "heads": (3, 6, 12, 24), "depths": (5, 5, 22, 5)}
BASE: dict[str, Any] = {"dims": (96, 192, 384, 768), "heads": (4, 8, 16, 32), "depths": (5, 5, 23, 5)}
_MICRO: dict[str, Any] = {"dims": (48, 96, 192, 384), "heads": (2, 4, 8, 16), "depths": (2, 2, 15, 2)}
_TINY: dict[str, Any] = {"dims": (72, 144, 288, 576), "heads": (3, 6, 12, 24), "depths": (2, 2, 15, 2)}

# Parameters with 1,000 classes, as the authors' code has; drop path as in their configurations.
SIZES = {
    "transnext_micro": Size(12_809_304, {**_MICRO, "drop_path": 0.15}),
    "transnext_micro_aaaa": Size(13_114_008, {**_MICRO, "ratios": (16, 8, 4, 2), "image": 256, "drop_path": 0.15}),
    "transnext_tiny": Size(28_258_960, {**_TINY, "drop_path": 0.25}),
    "transnext_small": Size(49_741_564, {**SMALL, "drop_path": 0.45}),
    "transnext_base": Size(89_721_496, {**BASE, "drop_path": 0.6}),
}


@register(
    Card(
        name="transnext",
        title="TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
        paper="2311.17132",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N (9 + N/r²)",
        sample={
            "dims": (16, 24), "depths": (1, 1), "heads": (2, 3), "ratios": (2, 1), "mlp_ratios": (2, 2), "image": 32,
            "num_classes": 10,
        },
        probe=(32, 24),
        sizes=SIZES,
    )
)  # fmt: skip
class TransNeXt(Pyramid):
    """An image backbone in which every token sees the 3×3 around it and a pooled map of the whole, in one softmax.

        overlapping patches → [norm → aggregated attention → norm → ConvGLU] × depth → norm,  in each stage
        logits = linear(mean of the last stage)

    Images `(B, in_channels, H, W)` of any size to logits `(B, num_classes)`; `forward_features` gives each stage's map,
    normed. On images larger than those of training the window stays, the pooled map grows with the image, and the
    scores' scale and the places are those of the new size (the authors' extrapolation mode). Cost O(N (9 + N/r²)).
    Source: arXiv 2311.17132. `no_weight_decay` names the parameters that the authors train without decay.

    Args:
        dims, depths, heads, mlp_ratios: of each stage.
        ratios: how much smaller the pooled map is than the stage's own; 1 for cosine attention of all pairs.
        pool: the side of the pooled map instead, in each stage whose ratio is not 1.
        image: side of the images in training, to which the places of tokens relate.
        shared, routed: heads that each token always takes, and how many of the others, per stage (arXiv 2410.11842);
            None for plain attention.
        eps: of the norms around attention and ConvGLU, and at the end of each stage.
    """

    no_weight_decay = ("query_embedding", "window_bias", "cpb_", "temperature")

    def __init__(
        self,
        *,
        dims: Sequence[int] = (72, 144, 288, 576),
        depths: Sequence[int] = (2, 2, 15, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        window: int = 3,
        pool: int | None = None,
        image: int = 224,
        patch: int = 4,
        qkv_bias: bool = True,
        shared: Sequence[int] | None = None,
        routed: Sequence[int] | None = None,
        eps: float = 1e-6,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        stages = len(dims)
        given = {"heads": heads, "ratios": ratios, "mlp_ratios": mlp_ratios, "shared": shared, "routed": routed}
        for name, values in given.items():
            if values is not None and len(values) != stages:
                raise ValueError(f"{name} must be one per stage ({stages}), got {len(values)}")
        if image < patch * 2 ** (stages - 1):
            raise ValueError(f"image must be at least {patch * 2 ** (stages - 1)}, got {image}")
        norm = partial(nn.LayerNorm, eps=eps)

        def block(place: Place) -> nn.Module:
            stage = place.stage
            side = image // (patch * 2**stage)
            options: dict[str, Any] = dict(heads=heads[stage], bias=qkv_bias, trained=(side, side), dropout=dropout)
            if shared is not None and routed is not None:
                options.update(shared=shared[stage], routed=routed[stage])
            if ratios[stage] == 1:
                mixer = CosineAttention(place.dim, **options)
            else:
                mixer = AggregatedAttention(place.dim, window=window, ratio=ratios[stage], pool=pool, **options)
            mlp = ConvGLU(place.dim, int(place.dim * mlp_ratios[stage]) * 2 // 3)
            return Block(place.dim, mixer, layout="tokens", mlp=mlp, norm=norm, drop_path=place.drop_path)

        super().__init__(
            dims=dims,
            depths=depths,
            strides=(patch, *(2,) * (stages - 1)),
            stem=Downsample(in_channels, dims[0], patch, kernel=2 * patch - 1, padding=patch - 1),
            downsample=lambda dim, out, stride: Downsample(dim, out, stride, kernel=3, padding=1),
            block=block,
            stage_norm=partial(ChannelNorm, eps=eps),
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers as in all vision transformers; convolutions N(0, 2 / (outputs that read an input))."""
        super().init_weights()
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, std=math.sqrt(2 * m.groups / (m.weight[:, 0].numel())))
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
