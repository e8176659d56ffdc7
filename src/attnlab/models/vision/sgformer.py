"""SG-Former: a pyramid in which every other block merges the tokens that the block before it hardly looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from attnlab.cards import BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import ChannelNorm, drop_path_rates, trunc_normal_linear
from attnlab.models.skeletons.plain import Positions
from attnlab.models.skeletons.pyramid import Block, Place, Pyramid
from attnlab.models.skeletons.residual_mlp import ResidualDepthwise, ResidualMLP
from attnlab.nn.tokens.self_guided import GROUPS, EnhancedAttention, GuidedAttention, HybridAttention

_SMALL = {"dims": (64, 128, 256, 512), "heads": (2, 4, 8, 16)}
_BASE = {"dims": (96, 192, 384, 768), "heads": (4, 6, 12, 24)}

# Parameters with 1,000 classes, as the authors' code has.
SIZES = {
    "sgformer_small": Size(22_545_981, {**_SMALL, "depths": (2, 4, 16, 1)}),
    "sgformer_medium": Size(38_689_316, {**_SMALL, "depths": (2, 6, 28, 2)}),
    "sgformer_base": Size(77_950_293, {**_BASE, "depths": (4, 6, 24, 2)}),
}


def group_norm(dim: int) -> nn.GroupNorm:
    """Over all channels and places of a map."""
    return nn.GroupNorm(1, dim)


def conv_norm(dim: int, out_dim: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias and a norm over all of its map."""
    conv = nn.Conv2d(dim, out_dim, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, group_norm(out_dim))


class Stem(nn.Sequential):
    """Three 3×3 convolutions to a quarter of the size, each with a group norm, and a layer norm."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.conv1, self.act1 = conv_norm(in_channels, dim, 3, 2), nn.GELU()
        self.conv2, self.act2 = conv_norm(dim, dim, 3), nn.GELU()
        self.conv3, self.norm = conv_norm(dim, dim, 3, 2), ChannelNorm(dim)


class Merging(nn.Sequential):
    """Halves a map: 1×1, a depth-wise 3×3 of stride 2, and 1×1, each with a group norm."""

    def __init__(self, dim: int, out_dim: int, stride: int = 2) -> None:
        super().__init__()
        self.conv1, self.act1 = conv_norm(dim, out_dim, 1), nn.GELU()
        self.conv2, self.act2 = conv_norm(out_dim, out_dim, 3, stride, out_dim), nn.GELU()
        self.conv3 = conv_norm(out_dim, out_dim, 1)


def block(dim: int, mixer: nn.Module, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> Block:
    """x + mixer(norm(x)), then x + MLP(norm(x)), an MLP that looks at its neighbours."""
    return Block(
        dim,
        mixer,
        layout="tokens",
        mlp=ResidualMLP(dim, int(dim * mlp_ratio), conv_first=True),
        norm=lambda dim: nn.LayerNorm(dim, eps=1e-6),
        drop_path=drop_path,
    )


class SelfGuidedPair(nn.Module):
    """A block of hybrid attention and one that its significance guides, `(B, C, H, W)` to the same."""

    def __init__(self, hybrid: Block, guided: Block) -> None:
        super().__init__()
        self.hybrid, self.guided = hybrid, guided

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        grid = (x.shape[1], x.shape[2])
        first, second = cast(HybridAttention, self.hybrid.mixer), cast(GuidedAttention, self.guided.mixer)
        y, significance = first.scales(self.hybrid.norm1(x).flatten(1, 2), grid=grid)
        x = self._after(self.hybrid, x, y)
        y = second(self.guided.norm1(x).flatten(1, 2), significance, grid=grid)
        return self._after(self.guided, x, y).permute(0, 3, 1, 2)

    @staticmethod
    def _after(block: Block, x: Tensor, y: Tensor) -> Tensor:
        x = x + block.drop_path(y.view_as(x))
        return x + block.drop_path(block.mlp(block.norm2(x)))


@register(
    Card(
        name="sgformer",
        title="SG-Former: Self-guided Transformer with Evolving Token Reallocation",
        paper="2308.12216",
        family="tokens",
        kind=BACKBONE,
        cost="N²/r²",
        sample={
            "dims": (16, 32), "depths": (2, 1), "heads": (2, 2), "reductions": (2, 1), "window": 2, "image": 32,
            "num_classes": 10,
        },
        probe=(32, 24),
        sizes=SIZES,
    )
)  # fmt: skip
class SGFormer(Pyramid):
    """A backbone that spends its tokens where it looks: fine on what is significant, coarse on the rest.

        pairs of blocks:    x + hybrid(norm(x)), which also says how much each token is looked at,
                            x + guided(norm(x), significance); each with its MLP
        last stage:         attention from all to all

    Images `(B, in_channels, H, W)` to logits `(B, num_classes)`; `forward_features` gives the normed map of each stage.
    Sides are multiples of 4·stride·lcm(window, reduction) of every stage, 224 for the named sizes: the windows, the
    groups that are merged and the position of each place ask for it; positions are interpolated for others than `image`
    (the authors take 224² alone). Cost: see `HybridAttention` and `GuidedAttention`. Source: arXiv 2308.12216
    (OliverRensu/SG-Former).

    Args:
        depths, heads, reductions: per stage; a depth must be even where the reduction is above 1.
        groups: per reduction, how many tokens become one, from the least to the most significant.
        window: of the near heads. image: the size whose positions are learned, from sines and cosines on.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 4, 16, 1),
        heads: Sequence[int] = (2, 4, 8, 16),
        reductions: Sequence[int] = (8, 4, 2, 1),
        groups: dict[int, tuple[int, ...]] | None = None,
        window: int = 7,
        mlp_ratio: float = 4.0,
        bias: bool = True,
        image: int | tuple[int, int] = 224,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        sizes = GROUPS if groups is None else groups
        for name, values in (("heads", heads), ("reductions", reductions)):
            if len(values) != len(dims):
                raise ValueError(f"{name} needs one entry per stage, {len(dims)}, got {len(values)}")
        for depth, reduction in zip(depths, reductions, strict=True):
            if reduction > 1 and depth % 2:
                raise ValueError(f"depths must be even where blocks come in pairs, got {tuple(depths)}")
            if reduction > 1 and reduction not in sizes:
                raise ValueError(f"groups must have sizes for the reduction {reduction}, got those for {sorted(sizes)}")
        rates = drop_path_rates(drop_path, sum(depths))
        pairs = [depth // 2 if reduction > 1 else depth for depth, reduction in zip(depths, reductions, strict=True)]

        def build(place: Place) -> nn.Module:
            dim, reduction = place.dim, reductions[place.stage]
            options: dict[str, Any] = {"heads": heads[place.stage], "bias": bias}
            before = sum(depths[: place.stage])
            if reduction == 1:
                return block(dim, EnhancedAttention(dim, **options), mlp_ratio, rates[before + place.index])
            first, second = rates[before + 2 * place.index :][:2]
            hybrid = HybridAttention(dim, reduction=reduction, window=window, **options)
            guided = GuidedAttention(dim, groups=sizes[reduction], **options)
            return SelfGuidedPair(block(dim, hybrid, mlp_ratio, first), block(dim, guided, mlp_ratio, second))

        super().__init__(
            dims=dims,
            depths=pairs,
            strides=(4, *(2,) * (len(dims) - 1)),
            stem=Stem(in_channels, dims[0]),
            downsample=Merging,
            stage_norm=lambda dim: ChannelNorm(dim, eps=1e-6),
            block=build,
            in_channels=in_channels,
            num_classes=num_classes,
        )
        self.apply(initialise)
        side = (image, image) if isinstance(image, int) else image
        self.positions = Positions((side[0] // 4, side[1] // 4), dims[0])
        with torch.no_grad():
            self.positions.table.copy_(sines((side[0] // 4, side[1] // 4), dims[0]))
        steps = (
            stride * (1 if reduction == 1 else math.lcm(window, reduction))
            for stride, reduction in zip(self.reductions, reductions, strict=True)
        )
        self.multiple = math.lcm(*steps)

    def embed(self, x: Tensor) -> Tensor:
        """Images through the stem, with their positions."""
        if x.ndim == 4 and (x.shape[2] % self.multiple or x.shape[3] % self.multiple):
            raise ValueError(f"x must have sides that are multiples of {self.multiple}, got {tuple(x.shape[2:])}")
        maps = super().embed(x)
        grid = (maps.shape[2], maps.shape[3])
        return maps + self.positions.resized(grid).unflatten(0, grid).permute(2, 0, 1)

    def fuse(self) -> SGFormer:
        """For inference: the same network in evaluation, sums inside the convolutions of its MLPs; it stays so."""
        for module in self.eval().modules():
            if isinstance(module, ResidualDepthwise):
                module.fuse()
        return self


def initialise(module: nn.Module) -> None:
    """For `Module.apply`: truncated normal linear layers, and convolutions by how many outputs an input reaches."""
    trunc_normal_linear(module)
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def sines(grid: tuple[int, int], dim: int) -> Tensor:
    """Sines and cosines of each place's column, then of its row, `(H·W, dim)`, as in MAE (arXiv 2111.06377)."""
    if dim % 4:
        raise ValueError(f"dims must begin with a multiple of 4, got {dim}")
    rates = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64).unsqueeze(1) * rates for n in grid)
    rows, columns = (torch.cat((angle.sin(), angle.cos()), 1) for angle in (rows, columns))
    table = torch.cat((columns.expand(grid[0], -1, -1), rows.unsqueeze(1).expand(-1, grid[1], -1)), -1)
    return table.flatten(0, 1).float()
