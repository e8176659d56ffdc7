"""VOLO: outlook attention on fine tokens, then softmax attention on coarse ones, then class attention."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import MLP, DropPath, drop_path_rates, trunc_normal_linear
from attnlab.models.skeletons.plain import Positions, TokenBlock
from attnlab.nn.cross.class_attention import ClassAttention
from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.outlook import OutlookAttention
from attnlab.recipes.token_labelling import Box, random_box, swap_box


class ClassBlock(nn.Module):
    """A block that only summary tokens pass: (B, M, C) and the places (B, N, C) that they read → (B, M, C)."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = ClassAttention(dim, heads=heads, head_dim=head_dim, bias=qkv_bias, scale=scale)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, summary: Tensor, places: Tensor) -> Tensor:
        summary = summary + self.drop_path(self.mixer(self.norm1(summary), self.norm1(places)))
        return summary + self.drop_path(self.mlp(self.norm2(summary)))


class Stem(nn.Sequential):
    """Three convolutions at half the size, then one that makes patches: (B, 3, H, W) → (B, dim, H/patch, W/patch)."""

    def __init__(self, in_channels: int, hidden: int, dim: int, patch: int) -> None:
        layers: list[nn.Module] = []
        for inputs, kernel, stride in ((in_channels, 7, 2), (hidden, 3, 1), (hidden, 3, 1)):
            layers.append(nn.Conv2d(inputs, hidden, kernel, stride, kernel // 2, bias=False))
            layers += [nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.Conv2d(hidden, dim, patch // 2, patch // 2))


_SHALLOW, _DEEP = (4, 4, 8, 2), (8, 8, 16, 4)


def _size(params: int, depths: tuple[int, ...], dim: int, heads: tuple[int, int], **rest: float) -> Size:
    fine, coarse = heads
    arguments = {"depths": depths, "dims": (dim, *(2 * dim,) * 3), "heads": (fine, coarse, coarse, coarse), **rest}
    return Size(params, arguments)


# Parameters at 224² with 1,000 classes, counted on the authors' code.
SIZES = {
    "volo_d1": _size(26_632_040, _SHALLOW, 192, (6, 12)),
    "volo_d2": _size(58_678_336, (6, 4, 10, 4), 256, (8, 16)),
    "volo_d3": _size(86_325_072, _DEEP, 256, (8, 16)),
    "volo_d4": _size(192_961_520, _DEEP, 384, (12, 16)),
    "volo_d5": _size(295_455_584, (12, 12, 20, 4), 384, (12, 16), mlp_ratio=4.0, stem=128),
}


@register(
    Card(
        name="volo",
        title="VOLO: Vision Outlooker for Visual Recognition",
        paper="2106.13112",
        system="volo",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N k⁴ + (N/4)²",
        sample={
            "depths": (1, 1), "dims": (16, 24), "heads": (2, 2), "outlook": (True, False),
            "stem": 8, "image": 32, "num_classes": 10,
        },
        sizes=SIZES,
    )
)  # fmt: skip
class VOLO(nn.Module):
    """An image classifier that looks closely before it looks widely.

        stem (stride 8) → outlookers → 2×2 down → + positions → transformer blocks → class attention → heads

    Images (B, in_channels, H, W), any size, → logits (B, num_classes): the class token's, plus, with `dense=True`, half
    of each class's largest over the places. In training, `dense=True` gives what `token_label_loss` takes: class
    logits, place logits (B, N, num_classes) and the box in which `mix_token=True` swapped the fine tokens with those of
    the batch in reverse order (the place logits are swapped back already).
    Source: arXiv 2106.13112 (sail-sg/volo). As released, stochastic depth spares the outlookers, though its rates count
    them.

    Args:
        depths, dims, heads, outlook: of each group of blocks; `outlook` says which groups are outlookers.
        kernel, stride: of outlook attention. stem: hidden channels of the stem.
        image: the size whose positions are learned; they are interpolated for others.
        class_layers: blocks of class attention; with 0, or `mean=True`, the head reads the mean of all tokens.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = _SHALLOW,
        dims: Sequence[int] = (192, 384, 384, 384),
        heads: Sequence[int] = (6, 12, 12, 12),
        outlook: Sequence[bool] = (True, False, False, False),
        mlp_ratio: float | Sequence[float] = 3.0,
        kernel: int = 3,
        stride: int = 2,
        qkv_bias: bool = False,
        stem: int = 64,
        patch: int = 8,
        image: int = 224,
        in_channels: int = 3,
        num_classes: int = 1000,
        class_layers: int = 2,
        mean: bool = False,
        dense: bool = True,
        mix_token: bool = True,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        ratios = [mlp_ratio] * len(depths) if isinstance(mlp_ratio, (int, float)) else list(mlp_ratio)
        if not len(depths) == len(dims) == len(heads) == len(outlook) == len(ratios) > 1:
            raise ValueError(
                "depths, dims, heads, outlook and mlp_ratio need one entry per group, of two or more groups"
            )
        if any(a != b for a, b in pairwise(dims[1:])):
            raise ValueError(f"dims may change after the first group alone, got {tuple(dims)}")
        mean = mean or class_layers == 0
        if (mean and dense) or (mix_token and not dense):
            raise ValueError("dense=True needs a class token (mean=False), and mix_token=True needs dense=True")
        self.in_channels, self.mean, self.mix_token = in_channels, mean, mix_token
        self.channels, self.reductions = (dims[0], dims[-1]), (patch, 2 * patch)
        self.stem = Stem(in_channels, stem, dims[0], patch)
        rates = iter(drop_path_rates(drop_path, sum(depths)))
        self.groups = nn.ModuleList()
        for depth, dim, head, looks, ratio in zip(depths, dims, heads, outlook, ratios, strict=True):
            group = nn.ModuleList()
            for _ in range(depth):
                rate = next(rates)
                mixer = (
                    OutlookAttention(dim, heads=head, kernel=kernel, stride=stride, bias=qkv_bias)
                    if looks
                    else MultiHead(dim, heads=head, bias=qkv_bias, out_bias=True)
                )
                group.append(TokenBlock(dim, mixer, mlp_ratio=ratio, drop_path=0.0 if looks else rate))
            self.groups.append(group)
        self.down = nn.Conv2d(dims[0], dims[1], 2, 2)
        self.positions = Positions((image // self.reductions[-1],) * 2, dims[-1])
        self.dropout = nn.Dropout(dropout)
        token = nn.init.trunc_normal_(torch.empty(dims[-1]), std=0.02)
        self.class_token = nn.Parameter(token) if class_layers else None
        self.class_blocks = nn.ModuleList(
            ClassBlock(dims[-1], heads=heads[-1], mlp_ratio=ratios[-1], qkv_bias=qkv_bias) for _ in range(class_layers)
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.dense_head = nn.Linear(dims[-1], num_classes) if dense and num_classes else None
        self.apply(trunc_normal_linear)

    def embed(self, x: Tensor) -> Tensor:
        """The fine tokens as a map (B, H/patch, W/patch, C)."""
        if x.ndim != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < self.reductions[-1]:
            raise ValueError(
                f"x must be images (B, {self.in_channels}, H, W) of at least {self.reductions[-1]} pixels a side, "
                f"got {tuple(x.shape)}"
            )
        return self.stem(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)

    def encode(self, fine: Tensor) -> list[Tensor]:
        """The map after the outlookers and the one after all groups, (B, H, W, C) each."""
        maps = []
        for index, group in enumerate(self.groups):
            grid = (fine.shape[1], fine.shape[2])
            tokens = fine.flatten(1, 2)
            if index == 1:
                tokens = self.dropout(self.positions(tokens, grid=grid))
            for block in cast(nn.ModuleList, group):
                tokens = block(tokens, grid=grid)
            fine = tokens.unflatten(1, grid)
            if index == 0:
                maps.append(fine)
                fine = self.down(fine.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return [*maps, fine]

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Maps (B, C, H, W) at both resolutions; `channels` and `reductions` say which."""
        return [maps.permute(0, 3, 1, 2) for maps in self.encode(self.embed(x))]

    def forward(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor | tuple[Tensor, Tensor, Box]:
        fine = self.embed(x)
        box: Box = (0, 0, 0, 0)
        if self.training and self.mix_token:
            top, left, bottom, right = box = random_box((fine.shape[1] // 2, fine.shape[2] // 2), generator=generator)
            fine = swap_box(fine, (2 * top, 2 * left, 2 * bottom, 2 * right))
        coarse = self.encode(fine)[-1]
        places = coarse.flatten(1, 2)
        if self.class_token is None:
            return self.head(self.norm(places).mean(1))
        summary = self.class_token.expand(len(x), 1, -1)
        for block in self.class_blocks:
            summary = block(summary, places)
        if self.mean:
            return self.head(self.norm(torch.cat((summary, places), dim=1)).mean(1))
        logits = self.head(self.norm(summary)[:, 0])
        if self.dense_head is None:
            return logits
        dense = self.dense_head(self.norm(places))
        if not self.training:
            return logits + 0.5 * dense.amax(1)
        unmixed = swap_box(dense.unflatten(1, coarse.shape[1:3]), box) if self.mix_token else dense
        return logits, unmixed.flatten(1, -2), box
