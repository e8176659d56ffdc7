"""Super Token ViT: a pyramid whose early stages attend globally through superpixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import ConvNorm
from attnlab.models.skeletons.pyramid import Block, Place, Pyramid
from attnlab.models.skeletons.residual_mlp import ResidualDepthwise, ResidualMLP
from attnlab.nn.conv_norm import fold_norms
from attnlab.nn.tokens.super_tokens import SuperTokens


def _size(params: int, dims: Any, depths: Any, heads: Any, drop_path: float, scaled: bool = True) -> Size:
    scale = {"layer_scale": (None, None, 1e-6, 1e-6)} if scaled else {}
    return Size(params, {"dims": dims, "depths": depths, "heads": heads, "drop_path": drop_path, **scale})


# Parameters with 1,000 classes. The authors' code counts 162 more for each block, the 0s and 1s of its shifts.
SIZES = {
    "stvit_small": _size(25_495_624, (64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8), 0.1, scaled=False),
    "stvit_base": _size(51_691_288, (96, 192, 384, 512), (4, 6, 14, 6), (2, 3, 6, 8), 0.4),
    "stvit_large": _size(94_971_096, (96, 192, 448, 640), (4, 7, 19, 8), (2, 3, 7, 10), 0.6),
}


class Stem(nn.Sequential):
    """Four 3×3 convolutions, the first and third of stride 2, each with GELU and then a batch norm."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        widths = (in_channels, dim // 2, dim // 2, dim, dim)
        for i in range(4):
            self.add_module(f"conv{i + 1}", nn.Conv2d(widths[i], widths[i + 1], 3, 2 - i % 2, 1))
            self.add_module(f"act{i + 1}", nn.GELU())
            self.add_module(f"norm{i + 1}", nn.BatchNorm2d(widths[i + 1]))


class BatchNorm(nn.BatchNorm2d):
    """A batch norm on `(B, H, W, C)`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class LocalPositions(ResidualDepthwise):
    """x + dwconv3×3(x) on `(B, C, H, W)`, which tells places apart."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SuperTokenBlock(Block):
    """x + dwconv3×3(x), then super token attention behind a layer norm, then an MLP behind a batch norm."""

    def __init__(self, dim: int, mixer: nn.Module, *, mlp_ratio: float = 4.0, **block: Any) -> None:
        super().__init__(
            dim,
            mixer,
            mlp=ResidualMLP(dim, int(dim * mlp_ratio)),
            norm=lambda dim: nn.LayerNorm(dim, eps=1e-6),
            **block,
        )
        self.positions = LocalPositions(dim)
        self.norm2 = BatchNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.positions(x))

    @torch.no_grad()
    def fuse(self) -> None:
        """Sums into kernels, and the batch norm into the layer behind it."""
        self.positions.fuse()
        mlp = cast(ResidualMLP, self.mlp)
        mlp.conv.fuse()
        if isinstance(norm := self.norm2, BatchNorm):
            mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
            gain = norm.weight * (var + norm.eps).rsqrt()
            mlp.fc1.bias.add_(mlp.fc1.weight @ (norm.bias - mean * gain))
            mlp.fc1.weight *= gain
            self.norm2 = nn.Identity()


@register(
    Card(
        name="stvit",
        title="Vision Transformer with Super Token Sampling",
        paper="2211.11167",
        system="stvit",
        family="tokens",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N + (N/hw)²",
        sample={
            "dims": (16, 24), "depths": (1, 1), "heads": (2, 2), "cells": (2, 1), "head_dim": 32, "num_classes": 10,
        },
        probe=(36, 24),
        sizes=SIZES,
    )
)  # fmt: skip
class STViT(Pyramid):
    """A backbone that sees the whole map from its first stage on, through tokens that follow what is in it.

    Images `(B, in_channels, H, W)` of any size to logits `(B, num_classes)`; `forward_features` gives the map of each
    stage, at strides 4, 8, 16, 32. Cost: that of `SuperTokens` per block; in stages of cell 1 that of attention.
    Source: arXiv 2211.11167 (hhb072/STViT).

    Args:
        heads, cells, layer_scale: per stage. steps: of super token sampling, one number or one per stage.
        head_dim: channels before pooling.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 5, 9, 3),
        heads: Sequence[int] = (1, 2, 5, 8),
        cells: Sequence[int | tuple[int, int]] = (8, 4, 1, 1),
        steps: int | Sequence[int] = 1,
        mlp_ratio: float = 4.0,
        bias: bool = True,
        layer_scale: Sequence[float | None] | None = None,
        head_dim: int = 1024,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        scales = (None,) * len(dims) if layer_scale is None else tuple(layer_scale)
        counts = (steps,) * len(dims) if isinstance(steps, int) else tuple(steps)
        for name, values in (("heads", heads), ("cells", cells), ("layer_scale", scales), ("steps", counts)):
            if len(values) != len(dims):
                raise ValueError(f"{name} needs one entry per stage, {len(dims)}, got {len(values)}")

        def block(place: Place) -> nn.Module:
            mixer = SuperTokens(
                place.dim, heads=heads[place.stage], cell=cells[place.stage], steps=counts[place.stage], bias=bias
            )
            return SuperTokenBlock(
                place.dim, mixer, mlp_ratio=mlp_ratio, drop_path=place.drop_path, layer_scale=scales[place.stage]
            )

        super().__init__(
            dims=dims,
            depths=depths,
            strides=(4, *(2,) * (len(dims) - 1)),
            stem=Stem(in_channels, dims[0]),
            downsample=lambda dim, out, stride: ConvNorm(dim, out, 3, stride, bias=True),
            block=block,
            norm=ConvNorm(dims[-1], head_dim, 1, activation=nn.SiLU(), bias=True),
            head_dim=head_dim,
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
        )
        self.init_weights()

    def fuse(self) -> STViT:
        """For inference: the same network in evaluation, its batch norms inside other layers; it stays so."""
        fold_norms(self.eval())
        for module in self.modules():
            if isinstance(module, SuperTokenBlock):
                module.fuse()
        return self
