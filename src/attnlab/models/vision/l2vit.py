"""L²ViT: windows and linear attention over the whole map in turns, the latter concentrated again by convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import ChannelNorm, Downsample
from attnlab.models.skeletons.pyramid import Block, Place, Pyramid
from attnlab.models.vision.davit import DualBlock, NormPatches, PlaceConv
from attnlab.nn.linear.clamped import ClampedLinearAttention
from attnlab.nn.spatial.local_concentration import LocalConcentration
from attnlab.nn.spatial.multi_axis import BlockAttention

LOCAL, GLOBAL = "local", "global"

_BASE = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)}
# Parameters with 1,000 classes, as the authors' code has.
SIZES = {
    "l2vit_tiny": Size(28_596_781, {}),
    "l2vit_small": Size(50_199_157, {"depths": (2, 2, 18, 2)}),
    "l2vit_base": Size(88_577_188, _BASE),
    "l2vit_base_384": Size(88_577_188, {**_BASE, "window": 12}),
}


class GlobalBlock(Block):
    """Linear attention over the whole map, local concentration, and an MLP, each added to what comes in.

    x = x + dwconv3×3(x);  x = x + attention(norm(x));  x = x + concentrate(norm(x));  x = x + mlp(norm(x))

    `(B, C, H, W)` to the same; `concentrate=False` leaves the third step out.
    """

    def __init__(
        self, dim: int, *, heads: int, mlp_ratio: float = 4.0, concentrate: bool = True, drop_path: float = 0.0
    ) -> None:
        mixer = ClampedLinearAttention(dim, heads=heads)
        super().__init__(dim, mixer, layout="tokens", mlp=mlp_ratio, drop_path=drop_path)
        self.place = PlaceConv(dim)
        self.norm3 = nn.LayerNorm(dim) if concentrate else None
        self.concentrate = LocalConcentration(dim) if concentrate else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.place(x).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.mix(self.norm1(x)))
        if self.norm3 is not None and self.concentrate is not None:
            near = self.concentrate(self.norm3(x).permute(0, 3, 1, 2))
            x = x + self.drop_path(near.permute(0, 2, 3, 1))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class FilledPatches(Downsample):
    """4×4 patches and a norm; images are filled up to multiples of 4 first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_filled(x))


def _filled(x: Tensor) -> Tensor:
    below, right = -x.shape[2] % 4, -x.shape[3] % 4
    return F.pad(x, (0, right, 0, below)) if below or right else x


class Stem(nn.Module):
    """A quarter of the image's size by two 3×3 convolutions; images are filled up to multiples of 4 first."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(in_channels, dim // 2, 3, 2, 1), nn.BatchNorm2d(dim // 2)
        self.conv2, self.norm2 = nn.Conv2d(dim // 2, dim, 3, 2, 1), nn.BatchNorm2d(dim)
        self.norm = ChannelNorm(dim)

    def convolve(self, x: Tensor) -> Tensor:
        """All but the last norm."""
        return self.norm2(self.conv2(F.relu(self.norm1(self.conv1(_filled(x))), inplace=True)))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convolve(x))


@register(
    Card(
        name="l2vit",
        title="The Linear Attention Resurrection in Vision Transformer",
        paper="2501.16182",
        system="l2vit",
        family="linear",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
        sample={
            "dims": (16, 16), "depths": (2, 2), "heads": (2, 2), "window": 3, "num_classes": 10,
        },
        probe=(40, 24),
        sizes=SIZES,
    )
)  # fmt: skip
class L2ViT(Pyramid):
    """A backbone that sees windows sharply and the whole map in linear time, in turns.

    Images `(B, in_channels, H, W)`, any size, to logits `(B, num_classes)`; `forward_features` gives the map of each
    stage. Maps are filled up with zeros to whole windows, which tokens at the edge see, as in the authors' code; so are
    maps of odd sides between stages. Cost O(N). Source: arXiv 2501.16182 (ChuanyangZheng/L2ViT).

    Args:
        blocks: kinds of block that take turns in each stage: windows ("local"), and linear attention with
            concentration ("global"). concentrate: whether the latter have it.
        convolutional: a stem of two convolutions, or plain 4×4 patches.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float | Sequence[float] = 4.0,
        window: int = 7,
        blocks: Sequence[str] = (LOCAL, GLOBAL),
        concentrate: bool = True,
        convolutional: bool = True,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        ratios = [mlp_ratio] * len(dims) if isinstance(mlp_ratio, (int, float)) else mlp_ratio
        if not len(dims) == len(depths) == len(heads) == len(ratios):
            raise ValueError(
                f"dims, depths, heads and mlp_ratio need one entry per stage, got {len(dims)}, {len(depths)}, "
                f"{len(heads)} and {len(ratios)}"
            )
        if not blocks or not {*blocks} <= {LOCAL, GLOBAL}:
            raise ValueError(f"blocks must be of {LOCAL!r} and {GLOBAL!r}, got {tuple(blocks)}")

        def block(place: Place) -> nn.Module:
            count, ratio = heads[place.stage], ratios[place.stage]
            if blocks[place.index % len(blocks)] == GLOBAL:
                return GlobalBlock(
                    place.dim, heads=count, mlp_ratio=ratio, concentrate=concentrate, drop_path=place.drop_path
                )
            mixer = BlockAttention(place.dim, heads=count, window=window, biased=False, see_filling=True)
            return DualBlock(place.dim, mixer, mlp_ratio=ratio, drop_path=place.drop_path)

        super().__init__(
            dims=dims,
            depths=depths,
            strides=(4, *(2,) * (len(dims) - 1)),
            stem=Stem(in_channels, dims[0]) if convolutional else FilledPatches(in_channels, dims[0], 4),
            downsample=NormPatches,
            block=block,
            norm=ChannelNorm(dims[-1]),
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers and convolutions alike: truncated normal weights of deviation 0.02, zero biases."""
        super().init_weights()
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
