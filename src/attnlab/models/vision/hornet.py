"""HorNet: a ConvNeXt-shaped pyramid whose blocks multiply places, at an order that rises from stage to stage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import ChannelNorm, Downsample, NormFirst
from attnlab.models.skeletons.pyramid import Block, Place, Pyramid
from attnlab.nn.spatial.gated_conv import RecursiveGatedConv

# Filters of the last two stages, for images of 224 and 384 pixels.
_GLOBAL = {224: (None, None, (14, 8), (7, 4)), 384: (None, None, (24, 13), (12, 7))}


def _size(params: int, dim: int, drop_path: float, image: int | None = None) -> Size:
    arguments: dict[str, Any] = {"dim": dim, "drop_path": drop_path}
    return Size(params, arguments if image is None else {**arguments, "spectra": _GLOBAL[image]})


# Parameters with 1,000 classes, as the authors' code has; width; drop path of their recipes.
SIZES = {
    "hornet_tiny_7x7": _size(22_409_512, 64, 0.2),
    "hornet_tiny_gf": _size(22_991_848, 64, 0.2, 224),
    "hornet_small_7x7": _size(49_528_264, 96, 0.4),
    "hornet_small_gf": _size(50_401_768, 96, 0.4, 224),
    "hornet_base_7x7": _size(87_256_680, 128, 0.5),
    "hornet_base_gf": _size(88_421_352, 128, 0.5, 224),
    "hornet_large_7x7": _size(194_542_504, 192, 0.2),
    "hornet_large_gf": _size(196_289_512, 192, 0.2, 224),
    "hornet_large_gf_384": _size(201_806_824, 192, 0.4, 384),
}


@register(
    Card(
        name="hornet",
        title="HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions",
        paper="2207.14284",
        system="hornet",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N",
        sample={
            "dim": 8, "depths": (1, 1, 1, 1), "orders": (2, 3, 4, 2), "spectra": (None, None, (2, 2), (1, 1)),
            "num_classes": 10,
        },
        probe=(64, 32),
        sizes=SIZES,
    )
)  # fmt: skip
class HorNet(Pyramid):
    """A backbone of recursive gated convolutions: no attention, linear in pixels, any image size.

    Images `(B, in_channels, H, W)`, any size from 32² on, to logits `(B, num_classes)`; `forward_features` gives the
    map of each stage. Sizes `_7x7` filter by depth-wise convolutions, `_gf` by global and local filters in the last
    two stages, resized for images of other than 224 pixels. Cost O(N), and O(N log N) with global filters.
    Source: arXiv 2207.14284 (raoyongming/HorNet).

    Args:
        dim: width of the first stage, doubled at each later one.
        orders, scale: of `RecursiveGatedConv`, order by stage. spectra: by stage, of its global filter; None for 7×7.
        layer_scale: start value of the learned scale per channel; None for none.
    """

    def __init__(
        self,
        *,
        dim: int = 64,
        depths: Sequence[int] = (2, 3, 18, 2),
        orders: Sequence[int] = (2, 3, 4, 5),
        spectra: Sequence[tuple[int, int] | None] | None = None,
        scale: float = 1 / 3,
        layer_scale: float | None = 1e-6,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        stages = len(depths)
        spectra = (None,) * stages if spectra is None else spectra
        if not len(orders) == len(spectra) == stages:
            raise ValueError(
                f"orders and spectra need one entry per stage ({stages}), got {len(orders)} and {len(spectra)}"
            )
        norm, dims = partial(ChannelNorm, eps=1e-6), [dim * 2**stage for stage in range(stages)]

        def block(place: Place) -> nn.Module:
            at = place.stage
            mixer = RecursiveGatedConv(place.dim, order=orders[at], scale=scale, spectrum=spectra[at])
            return Block(
                place.dim,
                mixer,
                norm=partial(nn.LayerNorm, eps=1e-6),
                layer_scale=layer_scale,
                drop_path=place.drop_path,
            )

        super().__init__(
            dims=dims,
            depths=depths,
            strides=(4, *(2,) * (stages - 1)),
            stem=Downsample(in_channels, dim, 4, norm=norm),
            downsample=partial(NormFirst, norm=norm),
            block=block,
            norm=nn.LayerNorm(dims[-1], eps=1e-6),
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
        )
        self.init_weights()

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_head(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))  # the norm comes after the mean
        return self.head(self.dropout(x if self.norm is None else self.norm(x)))
