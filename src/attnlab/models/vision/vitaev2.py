"""ViTAEv2 and Swin with varied-size windows: a pyramid of cells in which convolutions run beside the attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import MLP, ChannelNorm, DropPath
from attnlab.models.skeletons.pyramid import Block, Place, Pyramid
from attnlab.models.vision.nat import Merging
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.spatial.varied_window import VariedWindowAttention

_TITLE = "VSA: Learning Varied-Size Window Attention in Vision Transformers"


def convolutions(widths: Sequence[int], groups: int, strides: Sequence[int] = (1, 1, 1)) -> nn.Sequential:
    """The branch beside the attention (PCM): three grouped 3×3 convolutions, batch norm and SiLU between them."""
    layers: list[nn.Module] = []
    for i, stride in enumerate(strides):
        layers.append(nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1, groups=groups))
        if i < len(strides) - 1:
            layers += [nn.BatchNorm2d(widths[i + 1]), nn.SiLU(inplace=True)]
    return nn.Sequential(*layers)


class NormalCell(nn.Module):
    """Attention and convolutions side by side, then an MLP; `(B, C, H, W)` to the same.

    x = x + drop_path(attention(norm1(x + positions(x)))) + drop_path(convs(x))
    x = x + drop_path(mlp(norm2(x)))
    """

    def __init__(
        self, dim: int, *, heads: int, window: int, groups: int, mlp_ratio: float = 4.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.positions = DepthwiseConv(dim, 7)
        self.norm1, self.norm2 = ChannelNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attention = VariedWindowAttention(dim, heads=heads, window=window)
        self.convs = convolutions((dim, hidden, dim, dim), groups)
        self.mlp = MLP(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(self.norm1(x + self.positions(x)))
        x = (x + self.drop_path(y) + self.drop_path(self.convs(x))).permute(0, 2, 3, 1)
        return (x + self.drop_path(self.mlp(self.norm2(x)))).permute(0, 3, 1, 2)


class ReductionCell(nn.Module):
    """Shrinks a map by looking at it at several dilations, `(B, C, H, W)` to `(B, out, ⌈H/stride⌉, ⌈W/stride⌉)`.

        y = concatenation over dilations of GELU(conv(x))               (PRM)
        x = attention(norm1(y + positions(y))) + convs(x)               the convolutions take the strides too
        x = x + mlp(norm2(x))

    A map that the stride does not divide is padded with zeros below and to the right.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        stride: int,
        *,
        hidden: int,
        kernel: int,
        dilations: Sequence[int],
        heads: int,
        window: int,
        groups: int,
        wide: bool,
    ) -> None:
        super().__init__()
        if stride not in (2, 4, 8):
            raise ValueError(f"stride must be 2, 4 or 8, got {stride}")
        self.stride = stride
        self.views = nn.ModuleList(
            nn.Conv2d(dim, hidden, kernel, stride, math.ceil(((kernel - 1) * d + 1 - stride) / 2), dilation=d)
            for d in dilations
        )
        seen, inner = hidden * len(dilations), 2 * out_dim if wide else hidden
        self.positions = DepthwiseConv(seen, 7)
        self.norm1, self.norm2 = ChannelNorm(seen), nn.LayerNorm(out_dim)
        self.attention = VariedWindowAttention(seen, heads=heads, window=window, out_dim=out_dim)
        halvings = stride.bit_length() - 1
        self.convs = convolutions((dim, inner, inner, out_dim), groups, [2 if i < halvings else 1 for i in range(3)])
        self.mlp = MLP(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        below, right = (-n % self.stride for n in x.shape[2:])
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        height, width = (n // self.stride for n in x.shape[2:])
        # A dilated kernel whose padding comes out half a pixel short of the middle may see a place too many.
        y = torch.cat([F.gelu(view(x)[:, :, :height, :width]) for view in self.views], 1)
        y = self.attention(self.norm1(y + self.positions(y)))
        x = (y + self.convs(x)).permute(0, 2, 3, 1)
        return (x + self.mlp(self.norm2(x))).permute(0, 3, 1, 2)


def _size(params: int, dim: int, depth: int, heads: int, first: int, wide: bool) -> Size:
    arguments = {
        "dims": tuple(dim * 2**i for i in range(4)),
        "hidden": (dim, dim, 2 * dim, 4 * dim),
        "depths": (2, 2, depth, 2),
        "heads": tuple(heads * 2**i for i in range(4)),
        "reduction_heads": (heads, first, 2 * first, 4 * first),
        "wide": wide,
    }
    return Size(params, arguments)


# Parameters with 1,000 classes, counted on the authors' code.
SIZES = {
    "vitaev2_vsa_s": _size(19_773_300, 64, 8, 2, 2, False),
    "vitaev2_vsa_wide_s": _size(20_342_442, 64, 8, 2, 4, True),
    "vitaev2_vsa_wide_48m": _size(51_089_119, 96, 11, 3, 6, True),
    "vitaev2_vsa_wide_b": _size(93_711_532, 128, 12, 4, 8, True),
}


@register(
    Card(
        name="vitaev2_vsa",
        title=_TITLE,
        paper="2204.08446",
        system="vsa",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N m²",
        growth=1.0,
        sample={
            "dims": (8, 16), "hidden": (8, 8), "depths": (1, 1), "heads": (2, 2), "reduction_heads": (2, 2),
            "kernels": (7, 3), "dilations": ((1, 2), (1, 2)), "groups": (1, 2), "reduction_groups": (1, 2),
            "strides": (4, 2), "window": 3, "num_classes": 10,
        },
        probe=(40, 28),
        sizes=SIZES,
    )
)  # fmt: skip
class ViTAEv2(Pyramid):
    """ViTAEv2 with varied-size windows: dilated looks open each stage, convolutions run beside each attention.

    Images `(B, in_channels, H, W)` of any size to logits `(B, num_classes)`, read off the mean of the last map without
    a norm; `forward_features` gives the map of each stage. Source: arXiv 2204.08446 (ViTAE-Transformer/ViTAE-VSA); the
    cells are ViTAEv2's (arXiv 2202.10108). Stochastic depth rises over all cells, while the authors' schedule begins
    anew at each stage from the depth of the one before.

    Args:
        hidden: width of each dilated look, per stage; kernels, dilations: of those convolutions.
        heads, groups: of the cells' attention and convolutions.
        reduction_heads, reduction_groups: the same in what opens a stage.
        wide: the convolutions that open a stage are twice as wide as the stage, instead of `hidden`.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (64, 128, 256, 512),
        hidden: Sequence[int] = (64, 64, 128, 256),
        depths: Sequence[int] = (2, 2, 8, 2),
        heads: Sequence[int] = (2, 4, 8, 16),
        reduction_heads: Sequence[int] = (2, 2, 4, 8),
        kernels: Sequence[int] = (7, 3, 3, 3),
        dilations: Sequence[Sequence[int]] = ((1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2)),
        groups: Sequence[int] = (1, 32, 64, 128),
        reduction_groups: Sequence[int] = (1, 16, 32, 64),
        strides: Sequence[int] = (4, 2, 2, 2),
        wide: bool = False,
        window: int = 7,
        mlp_ratio: float = 4.0,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        tables = {
            "hidden": hidden, "depths": depths, "heads": heads, "reduction_heads": reduction_heads, "kernels": kernels,
            "dilations": dilations, "groups": groups, "reduction_groups": reduction_groups, "strides": strides,
        }  # fmt: skip
        for name, table in tables.items():
            if len(table) != len(dims):
                raise ValueError(f"{name} needs one entry per stage ({len(dims)}), got {len(table)}")

        def cell(place: Place) -> nn.Module:
            return NormalCell(
                place.dim,
                heads=heads[place.stage],
                window=window,
                groups=groups[place.stage],
                mlp_ratio=mlp_ratio,
                drop_path=place.drop_path,
            )

        def reduction(stage: int, before: int) -> nn.Module:
            return ReductionCell(
                before,
                dims[stage],
                strides[stage],
                hidden=hidden[stage],
                kernel=kernels[stage],
                dilations=dilations[stage],
                heads=reduction_heads[stage],
                window=window,
                groups=reduction_groups[stage],
                wide=wide,
            )

        stages = iter(range(1, len(dims)))
        super().__init__(
            dims=dims,
            depths=depths,
            strides=strides,
            stem=reduction(0, in_channels),
            downsample=lambda before, after, stride: reduction(next(stages), before),
            block=cell,
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
        )
        self.init_weights()
        for module in self.modules():
            if isinstance(module, VariedWindowAttention):
                module.reset_windows()


@register(
    Card(
        name="swin_vsa",
        title=_TITLE,
        paper="2204.08446",
        system="vsa",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N m²",
        growth=1.0,
        sample={"dim": 8, "depths": (1, 1), "heads": (2, 2), "window": 3, "num_classes": 10},
        probe=(40, 28),
    )
)
class SwinVSA(Pyramid):
    """Swin without its shift: a 7×7 depth-wise convolution of positions before each attention, and windows that vary.

    Images `(B, in_channels, H, W)` of any size to logits; the defaults are Swin-T's. Source: arXiv 2204.08446.
    """

    def __init__(
        self,
        *,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        mlp_ratio: float = 4.0,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        if len(heads) != len(depths):
            raise ValueError(f"heads needs one entry per stage ({len(depths)}), got {len(heads)}")

        def block(place: Place) -> nn.Module:
            return Block(
                place.dim,
                VariedWindowAttention(place.dim, heads=heads[place.stage], window=window),
                mlp=mlp_ratio,
                drop_path=place.drop_path,
                local=DepthwiseConv(place.dim, 7),
            )

        dims = [dim * 2**stage for stage in range(len(depths))]
        super().__init__(
            dims=dims,
            depths=depths,
            strides=(4, *(2,) * (len(depths) - 1)),
            downsample=Merging,
            block=block,
            norm=ChannelNorm(dims[-1]),
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
        )
        self.init_weights()
        for module in self.modules():
            if isinstance(module, VariedWindowAttention):
                module.reset_windows()
