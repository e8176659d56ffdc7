"""CrossFormer and CrossFormer++: embeddings of several kernel sizes, attention near and far in turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import ChannelNorm
from attnlab.models.skeletons.pyramid import Block, Place, Pyramid
from attnlab.nn.spatial.cross_scale import LongShortDistance


def _size(params: int, dim: int, depths: tuple[int, ...], drop_path: float, **arguments: Any) -> Size:
    return Size(params, {"dim": dim, "depths": depths, "drop_path": drop_path, **arguments})


_T, _S, _B = (1, 1, 8, 6), (2, 2, 6, 2), (2, 2, 18, 2)
_PLUS: dict[str, Any] = {"windows": (4, 4, 14, 7), "intervals": (4, 2, 1, 1), "cooling": True}

# Parameters with 1,000 classes, as the authors' code has; `crossformerpp` are those of arXiv 2303.06908.
SIZES = {
    "crossformer_tiny": _size(27_776_794, 64, _T, 0.1),
    "crossformer_small": _size(30_657_394, 96, _S, 0.2),
    "crossformer_base": _size(51_971_554, 96, _B, 0.3),
    "crossformer_large": _size(91_971_184, 128, _B, 0.5),
    "crossformerpp_small": _size(23_325_340, 64, _B, 0.2, **_PLUS),
    "crossformerpp_base": _size(51_994_594, 96, _B, 0.3, **_PLUS),
    "crossformerpp_large": _size(92_001_904, 128, _B, 0.5, **_PLUS),
    "crossformerpp_huge": _size(95_962_944, 128, (6, 6, 18, 2), 0.7, **_PLUS),
}


class CrossScale(nn.Module):
    """Convolutions of several kernel sizes side by side, all with one stride.

    `(B, C, H, W)` to `(B, dim, ⌈H/stride⌉, ⌈W/stride⌉)`. The smallest kernel gives half of the
    channels, each larger one half of what is left. A norm before or after.
    """

    def __init__(
        self,
        input_dim: int,
        dim: int,
        stride: int,
        *,
        kernels: Sequence[int],
        before: bool = False,
        after: bool = False,
    ) -> None:
        super().__init__()
        if min(kernels) < stride or any((kernel - stride) % 2 for kernel in kernels):
            raise ValueError(f"kernels must be stride = {stride} or larger by an even number, got {tuple(kernels)}")
        widths = [dim // 2 ** min(i, len(kernels) - 1) for i in range(1, len(kernels) + 1)]
        self.stride = stride
        self.before = ChannelNorm(input_dim) if before else nn.Identity()
        self.convs = nn.ModuleList(
            nn.Conv2d(input_dim, width, kernel, stride, (kernel - stride) // 2)
            for width, kernel in zip(widths, kernels, strict=True)
        )
        self.after = ChannelNorm(dim) if after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        below, right = -x.shape[2] % self.stride, -x.shape[3] % self.stride
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        return self.after(torch.cat([self.convolve(conv, x) for conv in self.convs], 1))

    def convolve(self, conv: Any, x: Tensor) -> Tensor:
        kernel, step = conv.kernel_size[0], self.stride
        if kernel < 8 * step or kernel % step:
            return conv(x)
        # The gradient of such a kernel is slow (a hundred times, for 32 on three channels); that of the same products
        # between cells of stride × stride pixels, with a kernel that is as much smaller, is not.
        cells = F.pixel_unshuffle(F.pad(x, (conv.padding[0],) * 4), step)
        return F.conv2d(cells, F.pixel_unshuffle(conv.weight, step), conv.bias)


class CrossScaleBlock(Block):
    """A block; with `cooling`, LayerNorm(dwconv3×3(x)) of its output, without a shortcut, keeps activations small."""

    def __init__(self, dim: int, mixer: nn.Module, *, cooling: bool = False, **block: Any) -> None:
        super().__init__(dim, mixer, layout="tokens", **block)
        self.cooling = (
            nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim), ChannelNorm(dim)) if cooling else None
        )

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.cooling is None else self.cooling(x)


@register(
    Card(
        name="crossformer",
        title="CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention",
        paper="2108.00154",
        system="crossformer",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N w²",
        growth=1.0,
        sample={
            "dim": 32, "depths": (2, 1), "heads": (2, 2), "windows": (2, 2), "intervals": (2, 1), "kernels": (4, 8),
            "num_classes": 10,
        },
        probe=(32, 24),
        sizes=SIZES,
    )
)  # fmt: skip
class CrossFormer(Pyramid):
    """A backbone whose tokens hold features of several scales, and meet their neighbours and far ones in turns.

    Images `(B, in_channels, H, W)` to logits `(B, num_classes)`; `forward_features` gives the map of each stage. Any
    size: sides that a stride does not divide are filled up with zeros (the authors take multiples of 32 only).
    Sources: arXiv 2108.00154, and 2303.06908 for the sizes with ++ (cheerss/CrossFormer).

    Args:
        dim: width of the first stage, doubled at each later one. heads: of each stage; width/32 if None.
        windows, intervals: of each stage: groups of window² tokens, in every other block `interval` apart.
        kernels: of the stem; merges: between stages.
        cooling: the ++ version: every third block but a stage's last ends in a convolution without shortcut.
    """

    def __init__(
        self,
        *,
        dim: int = 96,
        depths: Sequence[int] = _S,
        heads: Sequence[int] | None = None,
        windows: Sequence[int] = (7, 7, 7, 7),
        intervals: Sequence[int] = (8, 4, 2, 1),
        kernels: Sequence[int] = (4, 8, 16, 32),
        merges: Sequence[Sequence[int]] | None = None,
        mlp_ratio: float | Sequence[float] = 4.0,
        cooling: bool = False,
        bias: bool = True,
        patch_norm: bool = True,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        stages = len(depths)
        dims = [dim * 2**stage for stage in range(stages)]
        counts = [width // 32 for width in dims] if heads is None else heads
        ratios = [mlp_ratio] * stages if isinstance(mlp_ratio, (int, float)) else mlp_ratio
        between = iter([(2, 4)] * (stages - 1) if merges is None else merges)
        for name, values in (("heads", counts), ("windows", windows), ("intervals", intervals), ("mlp_ratio", ratios)):
            if len(values) != stages:
                raise ValueError(f"{name} must have one entry per stage ({stages}), got {len(values)}")

        def block(place: Place) -> nn.Module:
            stage, far = place.stage, place.index % 2 == 1
            mixer = LongShortDistance(
                place.dim,
                heads=counts[stage],
                window=windows[stage],
                interval=intervals[stage] if far else 1,
                bias=bias,
            )
            last = place.index == depths[stage] - 1
            return CrossScaleBlock(
                place.dim,
                mixer,
                cooling=cooling and place.index % 3 == 2 and not last,
                mlp=ratios[stage],
                drop_path=place.drop_path,
            )

        super().__init__(
            dims=dims,
            depths=depths,
            strides=(min(kernels), *(2,) * (stages - 1)),
            stem=CrossScale(in_channels, dim, min(kernels), kernels=kernels, after=patch_norm),
            downsample=lambda width, out, stride: CrossScale(width, out, stride, kernels=next(between), before=True),
            block=block,
            norm=ChannelNorm(dims[-1]),
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
            dropout=dropout,
        )
        self.init_weights()
