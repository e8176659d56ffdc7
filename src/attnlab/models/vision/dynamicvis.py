"""DynamicVis: a pyramid for very large images whose blocks scan only the tokens that a router picks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import ChannelNorm, Downsample
from attnlab.models.skeletons.pyramid import Place, Pyramid
from attnlab.nn.sparse.routed_mamba import RoutedMamba

# Parameters without a classifier, positions of 512² included, as the authors' backbones have.
SIZES = {
    "dynamicvis_base": Size(36_747_072, {"num_classes": 0}),
    "dynamicvis_large": Size(91_244_288, {"num_classes": 0, "dims": (128, 256, 512, 1024), "depths": (2, 4, 32, 4)}),
}

_norm = partial(ChannelNorm, eps=1e-6)


class MapPositions(nn.Module):
    """Adds a learned vector to each place of a map `(B, C, H, W)`, zero at first; resized by cubics for other sizes."""

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.zeros(grid[0] * grid[1], dim))

    def forward(self, x: Tensor) -> Tensor:
        maps = self.table.unflatten(0, self.grid).permute(2, 0, 1)
        if tuple(x.shape[2:]) != self.grid:
            maps = F.interpolate(maps[None], size=tuple(x.shape[2:]), mode="bicubic")[0]
        return x + maps


class RoutedBlock(nn.Module):
    """x + mixer(x) over the places of a map: `(B, C, H, W)` to the same."""

    def __init__(self, mixer: RoutedMamba) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[2], x.shape[3])
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        return (tokens + self.mixer(tokens, grid=grid)).unflatten(1, grid).permute(0, 3, 1, 2)


@register(
    Card(
        name="dynamicvis",
        title="DynamicVis: An Efficient and General Visual Foundation Model for Remote Sensing Image Understanding",
        paper="2503.16426",
        family="sparse",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N/r",
        growth=1.0,
        sample={
            "dims": (8, 12, 16, 20), "depths": (1, 1, 1, 1), "states": 4, "image": 64, "num_classes": 10,
        },
        probe=(64, 96),
        sizes=SIZES,
    )
)  # fmt: skip
class DynamicVis(Pyramid):
    """A backbone for images of thousands of pixels a side in which little matters: most tokens pass by the mixer.

        conv 7×7 of stride 4 + positions → 4 stages of x + routed_mamba(x), a conv 3×3 of stride 2 between → norms

    Images `(B, in_channels, H, W)`, any size, to `(B, num_classes)` logits of the normed mean; `forward_features` gives
    the normed map of each stage. There are no MLPs. Cost O(Σ (N/r + H) C²) for the mixers, see `RoutedMamba`.
    Pre-trained on labelled regions by `attnlab.recipes.regions`. Source: arXiv 2503.16426 (KyanChen/DynamicVis).

    Args:
        ratios: one token in so many is scanned, per stage.
        image: whose positions are learned, int or (height, width), resized for others; None for no positions.
        path, states, noise: of `RoutedMamba`.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 4, 16, 4),
        ratios: Sequence[int] = (8, 4, 2, 1),
        path: str = "mean",
        states: int = 16,
        noise: float = 0.1,
        image: int | tuple[int, int] | None = 512,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        if len(ratios) != len(dims):
            raise ValueError(f"ratios need one entry per stage ({len(dims)}), got {len(ratios)}")
        stem: list[nn.Module] = [Downsample(in_channels, dims[0], 4, kernel=7, padding=3, norm=_norm)]
        if image is not None:
            size = (image, image) if isinstance(image, int) else image
            stem.append(MapPositions((-(-size[0] // 4), -(-size[1] // 4)), dims[0]))

        def block(place: Place) -> nn.Module:
            mixer = RoutedMamba(place.dim, ratio=ratios[place.stage], path=path, states=states, noise=noise)
            return RoutedBlock(mixer)

        super().__init__(
            dims=dims,
            depths=depths,
            strides=(4, *(2,) * (len(dims) - 1)),
            stem=nn.Sequential(*stem),
            downsample=partial(Downsample, kernel=3, padding=1, norm=_norm),
            stage_norm=_norm,
            block=block,
            in_channels=in_channels,
            num_classes=num_classes,
        )
        self.pooled_norm = nn.LayerNorm(dims[-1], eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if num_classes:
            nn.init.normal_(self.head.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.pooled_norm(x.mean((2, 3))))
