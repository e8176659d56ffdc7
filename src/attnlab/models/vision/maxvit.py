"""MaxViT: every block is a convolution, attention in windows, and attention over a grid spread across the map."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.mbconv import MBConv, SameConv
from attnlab.models.skeletons.parts import MLP, DropPath
from attnlab.models.skeletons.pyramid import Block, Place, Pyramid
from attnlab.nn.spatial.groups import GroupAttention
from attnlab.nn.spatial.multi_axis import BlockAttention, GridAttention

_GELU = partial(nn.GELU, approximate="tanh")
_NORM = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


def _size(params: int, dim: int, depths: tuple[int, ...], stem_dim: int, drop_path: float) -> dict[str, Any]:
    return {"params": params, "dim": dim, "depths": depths, "stem_dim": stem_dim, "drop_path": drop_path}


# Parameters with 1,000 classes, as timm's port of the authors' code has; drop path of the paper's 224² runs.
_SIZES = {
    "maxvit_tiny": _size(30_916_528, 64, (2, 2, 5, 2), 64, 0.2),
    "maxvit_small": _size(68_927_956, 96, (2, 2, 5, 2), 64, 0.3),
    "maxvit_base": _size(119_467_708, 96, (2, 6, 14, 2), 64, 0.4),
    "maxvit_large": _size(211_785_560, 128, (2, 6, 14, 2), 128, 0.6),
    "maxvit_xlarge": _size(474_951_952, 192, (2, 6, 14, 2), 192, 0.6),
}
SIZES = {name: Size(size.pop("params"), size) for name, size in _SIZES.items()}


class MultiAxisBlock(nn.Sequential):
    """A convolution that may shrink the map, then windows and a grid, each with its MLP: `(B, C, H, W)` to maps."""

    def __init__(
        self, input_dim: int, dim: int, *, stride: int = 1, window: int = 7, head_dim: int = 32, drop_path: float = 0.0
    ) -> None:
        if dim % head_dim:
            raise ValueError(f"head_dim must divide the width {dim}, got {head_dim}")
        super().__init__()
        self.conv = MBConv(input_dim, dim, stride=stride, drop_path=DropPath(drop_path), activation=_GELU, norm=_NORM)
        mixers = {"block": BlockAttention, "grid": GridAttention}
        for name, mixer in mixers.items():
            attention = mixer(dim, heads=dim // head_dim, window=window)
            mlp = MLP(dim, 4 * dim, activation=_GELU)
            self.add_module(name, Block(dim, attention, layout="tokens", mlp=mlp, drop_path=drop_path))


class Stem(nn.Sequential):
    """Two 3×3 convolutions, the first of stride 2: an image to a map of half its size."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv1 = SameConv(dim, out_dim, 3, 2)
        self.norm = _NORM(out_dim)
        self.act = _GELU()
        self.conv2 = SameConv(out_dim, out_dim, 3)


@register(
    Card(
        name="maxvit",
        title="MaxViT: Multi-Axis Vision Transformer",
        paper="2204.01697",
        system="maxvit",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N w²",
        growth=1.0,
        sample={"dim": 16, "depths": (1, 1), "stem_dim": 8, "head_dim": 8, "window": 2, "num_classes": 10},
        probe=(32, 24),
        sizes=SIZES,
    )
)
class MaxViT(Pyramid):
    """A backbone that sees the whole map in every block, at every scale, in linear time.

    Images `(B, in_channels, H, W)` to logits `(B, num_classes)`; `forward_features` gives the map of each stage, at
    strides 4, 8, 16, 32. Any size: maps that the window does not divide are filled up inside the attention, and the
    filling is not seen (the authors take multiples of 32·window only).
    Source: arXiv 2204.01697 (google-research/maxvit).

    Args:
        dim: width of the first stage, doubled at each later one. stem_dim: of the stem.
        window: of block and of grid attention, 7 for images of 224², 12 for 384² and 16 for 512²: `rewindow` goes on
            from one to another. head_dim: width of a head.
    """

    def __init__(
        self,
        *,
        dim: int = 64,
        depths: Sequence[int] = (2, 2, 5, 2),
        stem_dim: int = 64,
        window: int = 7,
        head_dim: int = 32,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        dims = [dim * 2**stage for stage in range(len(depths))]

        def block(place: Place) -> nn.Module:
            return MultiAxisBlock(
                place.input_dim,
                place.dim,
                stride=1 if place.index else 2,
                window=window,
                head_dim=head_dim,
                drop_path=place.drop_path,
            )

        super().__init__(
            dims=dims,
            depths=depths,
            strides=(4, *(2,) * (len(depths) - 1)),
            stem=Stem(in_channels, stem_dim),
            stem_dim=stem_dim,
            downsample=None,
            block=block,
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
            dropout=dropout,
        )
        self.head_norm = nn.LayerNorm(dims[-1])
        self.head_hidden = nn.Linear(dims[-1], dims[-1])
        self.init_weights()

    def forward_head(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.head_hidden(self.head_norm(x.mean((2, 3)))))
        return self.head(self.dropout(x))

    def rewindow(self, window: int) -> None:
        """Go on with another window, for images of another size: the learned biases are interpolated bilinearly."""
        for module in self.modules():
            if isinstance(module, GroupAttention):
                module.rewindow(window)

    def fuse(self) -> MaxViT:
        """For inference: the same network in evaluation, with the batch norms inside the convolutions; it stays so."""
        for module in self.eval().modules():
            if isinstance(module, MBConv):
                module.fuse()
        return self
