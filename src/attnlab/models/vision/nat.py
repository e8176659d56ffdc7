"""NAT and DiNAT: pyramids of neighborhood attention, every second layer dilated in DiNAT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import ChannelNorm, ConvStem, Downsample
from attnlab.models.skeletons.pyramid import Block, Place, Pyramid
from attnlab.nn.spatial.neighborhood import NeighborhoodAttention

# Dilations of the blocks of each stage, repeated to the stage's depth: as far as the map of a 224-pixel image allows.
AT_224 = ((1, 8), (1, 4), (1, 2), (1,))
AT_384 = ((1, 13), (1, 6), (1, 3), (1,))


def _size(params: int, dim: int, depths: tuple[int, ...], heads: int, mlp: float, drop: float, **more: Any) -> Size:
    arguments = {"dim": dim, "depths": depths, "heads": heads, "mlp_ratio": mlp, "drop_path": drop}
    return Size(params, {**arguments, **more})


_MINI, _TINY, _SWIN_T, _SWIN = (3, 4, 6, 5), (3, 4, 18, 5), (2, 2, 6, 2), (2, 2, 18, 2)
_DILATED: dict[str, Any] = {"dilations": AT_224}
_PATCHES: dict[str, Any] = {"patches": True, "dilations": AT_224}

# Parameters with 1,000 classes (counted on the authors' code), width, depths, heads of the first stage, MLP ratio.
NAT_SIZES = {
    "nat_mini": _size(19_984_174, 64, _MINI, 2, 3.0, 0.2),
    "nat_tiny": _size(27_901_582, 64, _TINY, 2, 3.0, 0.2),
    "nat_small": _size(50_743_297, 96, _TINY, 3, 2.0, 0.3, layer_scale=1e-5),
    "nat_base": _size(89_769_652, 128, _TINY, 4, 2.0, 0.5, layer_scale=1e-5),
}
DINAT_SIZES = {
    "dinat_mini": _size(19_984_174, 64, _MINI, 2, 3.0, 0.2, **_DILATED),
    "dinat_tiny": _size(27_901_582, 64, _TINY, 2, 3.0, 0.2, **_DILATED),
    "dinat_small": _size(50_719_681, 96, _TINY, 3, 2.0, 0.3, **_DILATED),
    "dinat_base": _size(89_769_652, 128, _TINY, 4, 2.0, 0.5, layer_scale=1e-5, **_DILATED),
    "dinat_large": _size(200_943_514, 192, _TINY, 6, 2.0, 0.35, **_DILATED),
    "dinat_large_384": _size(200_943_514, 192, _TINY, 6, 2.0, 0.35, dilations=AT_384),
    "dinat_large_11x11": _size(201_144_250, 192, _TINY, 6, 2.0, 0.35, kernel=11, **_DILATED),
    "dinat_s_tiny": _size(28_288_354, 96, _SWIN_T, 3, 4.0, 0.2, **_PATCHES),
    "dinat_s_small": _size(49_606_258, 96, _SWIN, 3, 4.0, 0.3, **_PATCHES),
    "dinat_s_base": _size(87_768_224, 128, _SWIN, 4, 4.0, 0.5, **_PATCHES),
    "dinat_s_large": _size(196_532_476, 192, _SWIN, 6, 4.0, 0.35, **_PATCHES),
}


class Patches(Downsample):
    """Patches of an image, padded at the right and below to whole ones."""

    def forward(self, x: Tensor) -> Tensor:
        side = self.conv.stride[0]
        return super().forward(F.pad(x, (0, -x.shape[-1] % side, 0, -x.shape[-2] % side)))


class Merging(nn.Module):
    """Swin's way to shrink a map: the four tokens of each 2×2 block side by side, normed, projected to `out_dim`."""

    def __init__(self, dim: int, out_dim: int, stride: int = 2) -> None:
        super().__init__()
        if stride != 2:
            raise ValueError(f"stride must be 2, got {stride}")
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[-1] % 2, 0, -x.shape[-2] % 2)).permute(0, 2, 3, 1)
        four = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.reduction(self.norm(four)).permute(0, 3, 1, 2)


@register(
    Card(
        name="nat",
        title="Neighborhood Attention Transformer",
        paper="2204.07143",
        system="na",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N w²",
        growth=1.0,
        sample={"dim": 16, "depths": (1, 1), "heads": 2, "kernel": 3, "num_classes": 10},
        sizes=NAT_SIZES,
    )
)
class NAT(Pyramid):
    """An image backbone whose tokens attend to the 7×7 tokens around them: linear in pixels, any image size.

    Images `(B, in_channels, H, W)` to logits `(B, num_classes)`; `forward_features` gives the map of each stage. Stem
    and downsampling are 3×3 convolutions of stride 2. A map smaller than a window is padded with zeros (so do the
    authors). Source: arXiv 2204.07143 (NAT), 2209.15001 (DiNAT).

    Args:
        dim, heads: width and heads of the first stage, doubled at each later one (or `heads` for each).
        dilations: for each stage the dilations of its blocks, repeated to its depth; None is 1 everywhere.
        patches: the plain layout of Swin (4×4 patches, 2×2 merging) in place of convolutions: DiNAT_s.
        relative, bias: the learned table of relative positions, and biases in the projection of q, k and v.
    """

    def __init__(
        self,
        *,
        dim: int = 64,
        depths: Sequence[int] = (3, 4, 18, 5),
        heads: int | Sequence[int] = 2,
        kernel: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        patches: bool = False,
        relative: bool = True,
        bias: bool = True,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        stages = len(depths)
        per_stage = [heads * 2**i for i in range(stages)] if isinstance(heads, int) else list(heads)
        apart = [(1,)] * stages if dilations is None else [tuple(d) for d in dilations]
        for name, values in (("heads", per_stage), ("dilations", apart)):
            if len(values) < stages:
                raise ValueError(f"{name} must hold one entry per stage ({stages}), got {values}")
        dims = [dim * 2**stage for stage in range(stages)]

        def block(place: Place) -> nn.Module:
            steps = apart[place.stage]
            mixer = NeighborhoodAttention(
                place.dim,
                heads=per_stage[place.stage],
                kernel=kernel,
                dilation=steps[place.index % len(steps)],
                relative=relative,
                small="pad",
                bias=bias,
                out_bias=True,
            )
            return Block(
                place.dim,
                mixer,
                layout="tokens",
                mlp=mlp_ratio,
                layer_scale=layer_scale,
                drop_path=place.drop_path,
            )

        def downsample(before: int, after: int, stride: int) -> nn.Module:
            return Downsample(before, after, stride, kernel=3, padding=1, bias=False)

        super().__init__(
            dims=dims,
            depths=depths,
            strides=(4, *(2,) * (stages - 1)),
            stem=Patches(in_channels, dim, 4) if patches else ConvStem((in_channels, dim // 2, dim)),
            downsample=Merging if patches else downsample,
            block=block,
            norm=ChannelNorm(dims[-1]),
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
            dropout=dropout,
        )
        self.init_weights()


@register(
    Card(
        name="dinat",
        title="Dilated Neighborhood Attention Transformer",
        paper="2209.15001",
        system="dinat",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N w²",
        growth=1.0,
        sample={"dim": 16, "depths": (2, 1), "heads": 2, "kernel": 3, "num_classes": 10},
        sizes=DINAT_SIZES,
    )
)
class DiNAT(NAT):
    """NAT in which every second layer is dilated as far as the map allows, so that the view grows exponentially.

    Images `(B, in_channels, H, W)` to logits `(B, num_classes)`. Each stage's `dilations` repeat to its depth; the
    sizes named `dinat_s_…` have Swin's plain layout. Source: arXiv 2209.15001.
    """

    def __init__(self, *, dilations: Sequence[Sequence[int]] | None = AT_224, **keywords: Any) -> None:
        super().__init__(dilations=dilations, **keywords)
