"""GC ViT: windows that see themselves, and windows asked by queries of the whole map, in turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import ChannelNorm
from attnlab.models.skeletons.pyramid import Block, Place, Pyramid
from attnlab.nn.by_rows import by_rows
from attnlab.nn.spatial.global_query import FusedResidual, GlobalQueryAttention, QueryGenerator
from attnlab.nn.spatial.multi_axis import BlockAttention


def _size(params: int, dim: int, depths: tuple[int, ...], head_dim: int, drop_path: float, **arguments: Any) -> Size:
    return Size(params, {"dim": dim, "depths": depths, "head_dim": head_dim, "drop_path": drop_path, **arguments})


_WIDE: dict[str, Any] = {"mlp_ratio": 2.0, "layer_scale": 1e-5}

# Parameters with 1,000 classes, as the authors' code has.
SIZES = {
    "gcvit_xxtiny": _size(11_995_428, 64, (2, 2, 6, 2), 32, 0.2),
    "gcvit_xtiny": _size(19_981_294, 64, (3, 4, 6, 5), 32, 0.2),
    "gcvit_tiny": _size(28_221_974, 64, (3, 4, 19, 5), 32, 0.2),
    "gcvit_tiny2": _size(34_535_654, 64, (3, 4, 29, 5), 32, 0.2),
    "gcvit_small": _size(51_092_173, 96, (3, 4, 19, 5), 32, 0.3, **_WIDE),
    "gcvit_small2": _size(68_615_197, 96, (3, 4, 23, 5), 32, 0.3, **{**_WIDE, "mlp_ratio": 3.0}),
    "gcvit_base": _size(90_320_836, 128, (3, 4, 19, 5), 32, 0.5, **_WIDE),
    "gcvit_large": _size(202_075_570, 192, (3, 4, 19, 5), 32, 0.5, **_WIDE),
}


class ReduceSize(nn.Module):
    """Norm, convolution, then half the map by a 3×3 convolution, and a norm: `(B, C, H, W)` to `(B, out, ⌈H/2⌉, …)`."""

    def __init__(self, dim: int, out_dim: int, stride: int = 2) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(dim)
        self.mix = FusedResidual(dim)
        self.conv = nn.Conv2d(dim, out_dim, 3, stride, padding=1, bias=False)
        self.norm2 = ChannelNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv(self.mix(self.norm1(x))))


class ContextBlock(Block):
    """A block on `(B, H, W, C)` of a local window attention, or of one that asks the stage's global queries."""

    def __init__(self, dim: int, *, heads: int, window: int, local: bool, bias: bool = True, **block: Any) -> None:
        options: dict[str, Any] = {"heads": heads, "window": window, "bias": bias}
        mixer = BlockAttention(dim, **options) if local else GlobalQueryAttention(dim, levels=None, **options)
        super().__init__(dim, mixer, layout="tokens", **block)
        self.local_only = local

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        asked = {} if self.local_only else {"queries": queries}
        y = self.mixer(self.norm1(x).flatten(1, 2), grid=(x.shape[1], x.shape[2]), **asked).view(x.shape)
        return by_rows(self.after, x, y, through=(self.norm2, self.mlp, self.drop_path))


class ContextStage(nn.Module):
    """Shrink the map, make its global queries once, then run the blocks, each of which may ask them."""

    def __init__(self, downsample: nn.Module | None, blocks: nn.Sequential, queries: QueryGenerator) -> None:
        super().__init__()
        self.downsample, self.queries = downsample, queries
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.downsample is None else self.downsample(x)
        # A stage of one block has only a local one: nothing asks.
        queries = self.queries(x) if len(self.blocks) > 1 else None
        x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x, queries)
        return x.permute(0, 3, 1, 2)


@register(
    Card(
        name="gcvit",
        title="Global Context Vision Transformers",
        paper="2206.09959",
        system="gcvit",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N w²",
        growth=1.0,
        sample={"dim": 16, "depths": (2, 2), "head_dim": 8, "windows": (4, 4), "image": 32, "num_classes": 10},
        probe=(32, 24),
        sizes=SIZES,
    )
)
class GCViT(Pyramid):
    """A window backbone in which no window is shifted: queries made once per stage from the whole map connect them.

    Images `(B, in_channels, H, W)` to logits `(B, num_classes)`; `forward_features` gives the map of each stage. Blocks
    take turns, local first. Any image size: where windows do not divide a map it is filled up and the filling is not
    seen, and the queries are pooled to the window's size (the authors take one size only).
    Source: arXiv 2206.09959 (NVlabs/GCVit).

    Args:
        dim: width of the first stage, doubled at each later one. head_dim: width of a head, or heads of each stage.
        image: the size of image that the windows are for: a 32nd of it, and a 16th in the third stage, unless
            `windows` says else. It also says how often the query generators halve the map.
    """

    def __init__(
        self,
        *,
        dim: int = 64,
        depths: Sequence[int] = (3, 4, 19, 5),
        head_dim: int = 32,
        heads: Sequence[int] | None = None,
        image: int = 224,
        windows: Sequence[int] | None = None,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        bias: bool = True,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        stages = len(depths)
        dims = [dim * 2**stage for stage in range(stages)]
        counts = [width // head_dim for width in dims] if heads is None else heads
        sizes = [image // (16 if stage == 2 else 32) for stage in range(stages)] if windows is None else windows
        if not stages == len(counts) == len(sizes):
            raise ValueError(
                f"depths, heads and windows need one entry per stage, got {stages}, {len(counts)} and {len(sizes)}"
            )

        def block(place: Place) -> nn.Module:
            return ContextBlock(
                place.dim,
                heads=counts[place.stage],
                window=sizes[place.stage],
                local=place.index % 2 == 0,
                bias=bias,
                mlp=mlp_ratio,
                layer_scale=layer_scale,
                drop_path=place.drop_path,
            )

        super().__init__(
            dims=dims,
            depths=depths,
            strides=(4, *(2,) * (stages - 1)),
            stem=nn.Sequential(nn.Conv2d(in_channels, dim, 3, 2, 1), ReduceSize(dim, dim)),
            downsample=ReduceSize,
            block=block,
            norm=ChannelNorm(dims[-1]),
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
            dropout=dropout,
        )
        for index, (stage, reduction) in enumerate(zip(self.stages, self.reductions, strict=True)):
            levels = max(round(math.log2(image / reduction / sizes[index])), 0)
            queries = QueryGenerator(dims[index], heads=counts[index], window=sizes[index], levels=levels)
            self.stages[index] = ContextStage(stage.downsample, stage.blocks, queries)  # type: ignore[arg-type]
        self.init_weights()
