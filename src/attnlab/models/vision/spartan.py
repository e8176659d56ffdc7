"""SpaRTAN: a light convolutional pyramid of two ranges, whose channels mix as waves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import DropPath, trunc_normal_linear
from attnlab.models.skeletons.pyramid import Place, Pyramid
from attnlab.nn.channel.wave import WaveMixer
from attnlab.nn.conv_norm import ConvNorm, fold_norms
from attnlab.nn.spatial.smixer import ConvNormGELU, SMixer

# Parameters with 1,000 classes, as the authors' code has.
SIZES = {"spartan": Size(3_820_296, {"drop_path": 0.1})}


class Shrink(ConvNorm):
    """Halves a map: a 2×2 convolution without bias, a batch norm, and SiLU."""

    def __init__(self, dim: int, out_dim: int, stride: int = 2) -> None:
        super().__init__(dim, out_dim, stride, stride, activation=nn.SiLU(inplace=True))
        self.conv.padding = (0, 0)
        self.norm.eps = 1e-6


class SpartanBlock(nn.Module):
    """x + s₁ smixer(norm(x)), then x + s₂ wave(norm(x)): `(B, C, H, W)` to the same; norms over the whole map."""

    def __init__(self, dim: int, *, ratio: int, late: bool, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, dim, eps=1e-6), nn.GroupNorm(1, dim, eps=1e-6)
        # One of the two has dense convolutions, or of large groups: the spatial mixer at first, the other one later.
        self.mixer, self.wave = SMixer(dim, depthwise=late), WaveMixer(dim, ratio=ratio, depthwise=not late)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((dim, 1, 1), 1e-5)) for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.scale1 * self.mixer(self.norm1(x)))
        return x + self.drop_path(self.scale2 * self.wave(self.norm2(x)))


@register(
    Card(
        name="spartan",
        title="SpaRTAN: Spatial Reinforcement Token-based Aggregation Network for Visual Recognition",
        paper="2507.10999",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
        sample={"dims": (8, 16, 16, 24), "depths": (1, 1, 1, 1), "ratios": (2, 2, 2, 2), "num_classes": 10},
        probe=(64, 96),
        sizes=SIZES,
    )
)
class SpaRTAN(Pyramid):
    """A light image backbone of 3.8 million parameters: convolutions of two ranges, and channels mixed as waves.

        stem (two 3×3 of stride 2) → [x + s₁ smixer(norm x), x + s₂ wave(norm x)] × depth, four stages → mean → head

    Images `(B, in_channels, H, W)`, any size from 32² on, to logits `(B, num_classes)`; `forward_features` gives maps
    at strides 4, 8, 16, 32. In the first half of the stages the spatial mixer's convolutions are dense, in the second
    half depthwise. `fuse()` folds batch norms for inference. Source: arXiv 2507.10999 (henry-pay/SpaRTAN).

    Args:
        dims, depths: of each stage, dims multiples of 8. ratios: of the channel mixer's width to dims.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (3, 3, 12, 2),
        ratios: Sequence[int] = (4, 4, 2, 2),
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        if len(ratios) != len(dims):
            raise ValueError(f"ratios need one entry per stage ({len(dims)}), got {len(ratios)}")

        def block(place: Place) -> nn.Module:
            late = place.stage >= len(dims) // 2
            return SpartanBlock(place.dim, ratio=ratios[place.stage], late=late, drop_path=place.drop_path)

        total = sum(depths)
        super().__init__(
            dims=dims,
            depths=depths,
            strides=(4, *(2,) * (len(dims) - 1)),
            stem=nn.Sequential(ConvNormGELU(in_channels, dims[0] // 2, 2), ConvNormGELU(dims[0] // 2, dims[0], 2)),
            downsample=Shrink,
            block=block,
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path * (total - 1) / max(total, 1),  # the authors' rates rise to just below it
        )
        fused = {module.wtp for module in self.modules() if isinstance(module, WaveMixer)}
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
            elif isinstance(module, nn.Linear):  # the authors' 1×1 convolutions
                fan_out = module.out_features // (1 + (module in fused))
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
                nn.init.zeros_(module.bias)
        trunc_normal_linear(self.head)

    def fuse(self) -> SpaRTAN:
        """Fold the batch norms into their convolutions, in place; in evaluation, and for it alone."""
        fold_norms(self)
        return self
