"""SOFT: a pyramid without softmax in its first three stages, where a Gaussian kernel and landmarks take its place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import MLP
from attnlab.models.skeletons.plain import Positions, TokenBlock
from attnlab.models.skeletons.pyramid import Place, Pyramid
from attnlab.nn.linear.soft import SoftAttention
from attnlab.nn.multihead import MultiHead

_SHAPES = {
    "tiny": (13_069_056, (1, 2, 3, 2), 320),
    "small": (38_858_462, (1, 3, 20, 4), 320),
    "medium": (45_812_707, (1, 3, 29, 5), 288),
    "large": (64_700_646, (1, 3, 40, 5), 320),
    "huge": (87_108_273, (1, 5, 49, 5), 352),
}
# Parameters with 1,000 classes, as the released configurations have (the paper gives 24 million for "small").
SIZES = {
    f"{name}_{size}": Size(
        params,
        {"dims": (64, 128, dim, 512), "depths": depths, "heads": (2, 4, dim // 32, 16), "normalize": name == "softpp"},
    )
    for name in ("soft", "softpp")
    for size, (params, depths, dim) in _SHAPES.items()
}


class LinearPositions(Positions):
    """Learned vectors of the places of a grid, interpolated bilinearly for grids of other sizes."""

    def resized(self, grid: tuple[int, ...]) -> Tensor:
        if tuple(grid) == self.grid:
            return self.table
        maps = self.table[self.prefix :].t().reshape(1, -1, *self.grid)
        maps = F.interpolate(maps, size=tuple(grid), mode="bilinear", align_corners=False)
        return torch.cat((self.table[: self.prefix], maps[0].flatten(1).t()))


class PlacedConvs(nn.Module):
    """3×3 convolutions with batch norms and ReLUs, then learned positions: `(B, C, H, W)` to a smaller map.

    One of stride 2, or, as a stem, three of strides 2, 1 and 2 with 32 channels between. With `side=None` the positions
    are left to the stage.
    """

    def __init__(self, dim: int, out_dim: int, stride: int, side: int | None) -> None:
        super().__init__()
        steps = [(dim, out_dim, 2)] if stride == 2 else [(dim, 32, 2), (32, 32, 1), (32, out_dim, 2)]
        layers: list[nn.Module] = []
        for a, b, step in steps:
            layers += [nn.Conv2d(a, b, 3, step, 1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        self.convs = nn.Sequential(*layers)
        self.positions = None if side is None else LinearPositions((side, side), out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(x)
        if self.positions is None:
            return x
        grid = (x.shape[2], x.shape[3])
        return x + self.positions.resized(grid).unflatten(0, grid).permute(2, 0, 1)


class SoftBlock(nn.Module):
    """norm(x + dropout(mixer(x))), then norm(y + dropout(mlp(y))): `(B, C, H, W)` to the same, no norm before."""

    def __init__(self, dim: int, mixer: nn.Module, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.mixer, self.norm1 = mixer, nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim, activation=partial(nn.GELU, approximate="tanh"))
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[2], x.shape[3])
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
        x = self.norm1(x + self.dropout(self.mixer(x, grid=grid)))
        x = self.norm2(x + self.dropout(self.mlp(x)))
        return x.unflatten(1, grid).permute(0, 3, 1, 2)


class ClassStage(nn.Module):
    """The last stage: convolution, a class token, positions, softmax blocks, and a norm."""

    def __init__(
        self, downsample: nn.Module, blocks: Sequence[nn.Module], dim: int, side: int, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.class_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim), std=0.02))
        self.positions = LinearPositions((side, side), dim, prefix=1)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The class token and the places, (B, 1 + H·W, C), and the places' grid."""
        maps = self.downsample(x)
        grid = (maps.shape[2], maps.shape[3])
        tokens = torch.cat((self.class_token.expand(len(x), 1, -1), maps.permute(0, 2, 3, 1).flatten(1, 2)), 1)
        tokens = self.positions(tokens, grid=grid)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens), grid

    def forward(self, x: Tensor) -> Tensor:
        tokens, grid = self.tokens(x)
        return tokens[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)


@register(
    Card(
        name="soft",
        title="Softmax-free Linear Transformers",
        paper="2207.03341",
        system="soft",
        family="linear",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N m",
        sample={
            "dims": (16, 16, 16, 24), "depths": (1, 1, 1, 1), "heads": (2, 2, 2, 2), "kernels": (3, 3, 3),
            "image": 64, "num_classes": 10,
        },
        probe=(64, 96),
        sizes=SIZES,
    )
)  # fmt: skip
class SOFT(Pyramid):
    """A backbone whose tokens attend by a Gaussian kernel through landmarks; its last stage reads by softmax.

    Images `(B, in_channels, H, W)`, any size, to logits `(B, num_classes)` of a class token; `forward_features` gives
    the map of each stage, the last through its norm. Every stage adds learned positions, interpolated bilinearly.
    `drop_path` is an ordinary dropout in the first three stages. Cost O(N m). Sources: arXiv 2207.03341, 2110.11945
    (fudan-zvg/SOFT). The sizes `softpp_*` are the normalised SOFT++.

    Args:
        ratios, kernels: of `SoftAttention`, in the stages before the last. image: whose positions are learned.
        normalize, variant: of `SoftAttention`. eps: of the last stage's norms; those before have 1e-5.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (1, 2, 3, 2),
        heads: Sequence[int] = (2, 4, 10, 16),
        ratios: Sequence[int] = (8, 4, 2),
        kernels: Sequence[int] = (9, 5, 3),
        iterations: int = 20,
        normalize: bool = False,
        variant: str = "paper",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        eps: float = 1e-6,
        image: int = 224,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        stages = len(dims)
        if not len(heads) == stages == len(ratios) + 1 == len(kernels) + 1:
            raise ValueError(
                f"heads need one entry per stage ({stages}), ratios and kernels one for each but the last, got "
                f"{len(heads)}, {len(ratios)} and {len(kernels)}"
            )
        sides = [max(image // (4 * 2**stage), 1) for stage in range(stages)]

        def block(place: Place) -> nn.Module:
            at = place.stage
            if at == stages - 1:
                mixer = MultiHead(place.dim, heads=heads[at], bias=qkv_bias, out_bias=True)
                norm = partial(nn.LayerNorm, eps=eps)
                return TokenBlock(place.dim, mixer, mlp_ratio=mlp_ratio, norm=norm, drop_path=place.drop_path)
            soft = SoftAttention(
                place.dim, heads=heads[at], ratio=ratios[at], kernel=kernels[at], iterations=iterations,
                normalize=normalize, variant=variant,
            )  # fmt: skip
            return SoftBlock(place.dim, soft, dropout=place.drop_path)

        later = iter([*sides[1:-1], None])
        super().__init__(
            dims=dims,
            depths=depths,
            strides=(4, *(2,) * (stages - 1)),
            stem=PlacedConvs(in_channels, dims[0], 4, sides[0]),
            downsample=lambda before, after, stride: PlacedConvs(before, after, stride, next(later)),
            block=block,
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
        )
        last = self.stages[-1]
        self.stages[-1] = ClassStage(last.downsample, last.blocks, dims[-1], sides[-1], eps)  # type: ignore[arg-type]
        self.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for stage in self.stages[:-1]:
            x = stage(x)
        return self.head(self.stages[-1].tokens(x)[0][:, 0])  # type: ignore[operator]
