"""DaViT: blocks that attend among the places of a window, and blocks that attend among channels, in turns."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import ChannelNorm, Downsample
from attnlab.models.skeletons.pyramid import Block, Place, Pyramid
from attnlab.nn.by_rows import by_rows
from attnlab.nn.channel.channel_group import ChannelGroupAttention
from attnlab.nn.spatial.multi_axis import BlockAttention

SPATIAL, CHANNEL = "spatial", "channel"

# Parameters with 1,000 classes, as the authors' code has; of the two largest, which they did not publish, as timm has.
_DEEP = (1, 1, 9, 1)
SIZES = {
    "davit_tiny": Size(28_360_168, {"dim": 96, "drop_path": 0.1}),
    "davit_small": Size(49_745_896, {"dim": 96, "depths": _DEEP, "drop_path": 0.2}),
    "davit_base": Size(87_954_408, {"dim": 128, "depths": _DEEP, "drop_path": 0.4}),
    "davit_large": Size(196_811_752, {"dim": 192, "depths": _DEEP, "window": 12}),
    "davit_huge": Size(348_922_856, {"dim": 256, "depths": _DEEP}),
    "davit_giant": Size(1_406_470_120, {"dim": 384, "depths": (1, 1, 12, 3)}),
}


class PlaceConv(nn.Conv2d):
    """x + dwconv(x) on `(B, C, H, W)`: tells a token where it stands; the sum is part of the kernel."""

    def __init__(self, dim: int, kernel: int = 3) -> None:
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        unit = F.pad(self.weight.new_ones(1, 1), (self.kernel_size[0] // 2,) * 4)
        return F.conv2d(x, self.weight + unit, self.bias, 1, self.padding, 1, self.groups)


class DualBlock(Block):
    """A block with a `PlaceConv` before each of its two halves; `mlp_ratio=0` leaves out the second half."""

    def __init__(self, dim: int, mixer: nn.Module, *, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__(dim, mixer, layout="tokens", mlp=mlp_ratio or nn.Identity(), drop_path=drop_path)
        self.places = nn.ModuleList(PlaceConv(dim) for _ in range(2))
        self.plain = not mlp_ratio
        if self.plain:
            self.norm2 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.places[0](x).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.mix(self.norm1(x)))
        x = self.places[1](x.permute(0, 3, 1, 2))
        if self.plain:
            return x
        x = x.permute(0, 2, 3, 1)
        return by_rows(self.feed, x, through=(self.norm2, self.mlp, self.drop_path)).permute(0, 3, 1, 2)

    def feed(self, x: Tensor) -> Tensor:
        """The second half, on `(…, C)`."""
        return x + self.drop_path(self.mlp(self.norm2(x)))


class NormPatches(nn.Module):
    """Norm, then patches: `(B, C, H, W)` to `(B, out, ⌈H/stride⌉, ⌈W/stride⌉)`; overlapping 3×3 ones or filled up."""

    def __init__(self, dim: int, out_dim: int, stride: int = 2, *, overlap: bool = False) -> None:
        super().__init__()
        self.stride, self.overlap = stride, overlap
        self.norm = ChannelNorm(dim)
        self.conv = nn.Conv2d(dim, out_dim, stride + overlap, stride, padding=int(overlap))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        below, right = -x.shape[2] % self.stride, -x.shape[3] % self.stride
        if (below or right) and not self.overlap:
            x = F.pad(x, (0, right, 0, below))
        return self.conv(x)


@register(
    Card(
        name="davit",
        title="DaViT: Dual Attention Vision Transformers",
        paper="2204.03645",
        system="davit",
        family="channel",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
        sample={"dim": 16, "depths": (1, 1), "heads": (2, 2), "window": 3, "num_classes": 10},
        probe=(40, 24),
        sizes=SIZES,
    )
)
class DaViT(Pyramid):
    """A backbone with local detail from windows and global context from channels, both linear in the pixels.

    Images `(B, in_channels, H, W)`, any size, to logits `(B, num_classes)`; `forward_features` gives the map of each
    stage. Maps are filled up with zeros to whole windows, which tokens at the edge see, as in the authors' code.
    Source: arXiv 2204.03645 (dingmyu/davit).

    Args:
        dim: width of the first stage, doubled at each later one; or the widths of all.
        depths: of each stage, counted in rounds of `mixers`. mixers: kinds of attention that take turns.
        heads: of each stage, also its groups of channels; width/32 if None.
        overlap: overlapping 3×3 patches between stages. mlp_ratio: 0 for blocks without MLPs.
    """

    def __init__(
        self,
        *,
        dim: int | Sequence[int] = 96,
        depths: Sequence[int] = (1, 1, 3, 1),
        heads: Sequence[int] | None = None,
        window: int = 7,
        mixers: Sequence[str] = (SPATIAL, CHANNEL),
        mlp_ratio: float = 4.0,
        bias: bool = True,
        patch: int = 4,
        overlap: bool = False,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        dims = [dim * 2**stage for stage in range(len(depths))] if isinstance(dim, int) else list(dim)
        counts = [width // 32 for width in dims] if heads is None else heads
        if not len(depths) == len(dims) == len(counts):
            raise ValueError(
                f"dim, depths and heads need one entry per stage, got {len(dims)}, {len(depths)} and {len(counts)}"
            )
        if not mixers or not {*mixers} <= {SPATIAL, CHANNEL}:
            raise ValueError(f"mixers must be of {SPATIAL!r} and {CHANNEL!r}, got {tuple(mixers)}")

        def block(place: Place) -> nn.Module:
            mixer: nn.Module
            if mixers[place.index % len(mixers)] == CHANNEL:
                mixer = ChannelGroupAttention(place.dim, heads=counts[place.stage], bias=bias)
            else:
                mixer = BlockAttention(
                    place.dim, heads=counts[place.stage], window=window, bias=bias, biased=False, see_filling=True
                )
            return DualBlock(place.dim, mixer, mlp_ratio=mlp_ratio, drop_path=place.drop_path)

        super().__init__(
            dims=dims,
            depths=[depth * len(mixers) for depth in depths],
            strides=(patch, *(2,) * (len(dims) - 1)),
            stem=Downsample(in_channels, dims[0], patch, kernel=7, padding=3),
            downsample=lambda before, after, stride: NormPatches(before, after, stride, overlap=overlap),
            block=block,
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
            dropout=dropout,
        )
        self.head_norm = nn.LayerNorm(dims[-1])
        self.init_weights()

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.head_norm(x.mean((2, 3)))))
