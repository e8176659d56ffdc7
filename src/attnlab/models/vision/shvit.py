"""SHViT: large patches, convolutions alone at first, then attention of a single head over a part of the channels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import DropPath
from attnlab.models.skeletons.pyramid import Place, Pyramid
from attnlab.nn.channel.squeeze_excite import SqueezeExcite
from attnlab.nn.conv_norm import ConvNorm, ResidualConv, fold_norms
from attnlab.nn.spatial.single_head import SingleHeadAttention


def _size(params: int, dims: tuple[int, ...], depths: tuple[int, ...], widths: tuple[int, ...]) -> Size:
    return Size(params, {"dims": dims, "depths": depths, "widths": widths})


# Parameters with 1,000 classes, as the authors' code has.
SIZES = {
    "shvit_s1": _size(6_330_808, (128, 224, 320), (2, 4, 5), (32, 48, 68)),
    "shvit_s2": _size(11_483_072, (128, 308, 448), (2, 4, 5), (32, 66, 96)),
    "shvit_s3": _size(14_245_273, (192, 352, 448), (3, 5, 5), (48, 75, 96)),
    "shvit_s4": _size(16_588_484, (224, 336, 448), (4, 7, 6), (48, 72, 96)),
}


class FeedForward(nn.Sequential):
    """1×1 convolution to twice the channels, ReLU, and back, each with a batch norm, the last from 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = ConvNorm(dim, 2 * dim, 1, activation=nn.ReLU(inplace=True))
        self.fc2 = ConvNorm(2 * dim, dim, 1)
        nn.init.zeros_(self.fc2.norm.weight)


class SingleHeadBlock(nn.Module):
    """x + dwconv3×3(x), then x + mixer(x) if there is one, then x + mlp(x): `(B, C, H, W)` to the same.

    A fresh one is the identity: the batch norm that ends each path starts at 0.
    """

    def __init__(self, dim: int, mixer: nn.Module | None = None, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.conv = ResidualConv(dim)
        self.mixer, self.mlp = mixer, FeedForward(dim)
        self.drop_path = DropPath(drop_path)
        nn.init.zeros_(self.conv.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.mixer is not None:
            x = x + self.drop_path(self.mixer(x))
        return x + self.drop_path(self.mlp(x))


class ConvMerging(nn.Sequential):
    """Halves a map by an inverted residual with squeeze-and-excite, without its shortcut: `(B, out, ⌈H/2⌉, ⌈W/2⌉)`."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        hidden = 4 * dim
        self.conv1 = ConvNorm(dim, hidden, 1, activation=nn.ReLU(inplace=True))
        self.conv2 = ConvNorm(hidden, hidden, 3, 2, groups=hidden, activation=nn.ReLU(inplace=True))
        # The squeezed width is a quarter, rounded to a multiple of 8.
        self.se = SqueezeExcite(hidden, max((dim + 4) // 8 * 8, 8), activation=nn.ReLU)
        self.conv3 = ConvNorm(hidden, out_dim, 1)


class Shrink(nn.Sequential):
    """Between stages: a block without attention, `ConvMerging`, and another such block."""

    def __init__(self, dim: int, out_dim: int, stride: int = 2) -> None:
        super().__init__()
        self.before = SingleHeadBlock(dim)
        self.merge = ConvMerging(dim, out_dim)
        self.behind = SingleHeadBlock(out_dim)
        for block in (self.before, self.behind):
            nn.init.ones_(block.conv.norm.weight)


class Stem(nn.Sequential):
    """Four 3×3 convolutions of stride 2, doubling the width up to `dim`: 16×16 patches that overlap."""

    def __init__(self, in_channels: int, dim: int) -> None:
        widths = (in_channels, dim // 8, dim // 4, dim // 2, dim)
        super().__init__(
            *(ConvNorm(a, b, 3, 2, activation=nn.ReLU(inplace=True) if b < dim else None) for a, b in pairwise(widths))
        )


@register(
    Card(
        name="shvit",
        title="SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
        paper="2401.16456",
        system="shvit",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="(N/256)²",
        sample={
            "dims": (16, 20, 24), "depths": (1, 1, 1), "widths": (4, 6, 8), "key_dim": 4, "num_classes": 10,
        },
        probe=(64, 72),
        sizes=SIZES,
    )
)  # fmt: skip
class SHViT(Pyramid):
    """A fast backbone: patches of 16 pixels, three stages, and attention of one head in the last two.

        stem (stride 16) → depthwise convolution + attention of a fifth of the channels + MLP, × depth → mean → head

    Images `(B, in_channels, H, W)`, any size from 64² on, to logits `(B, num_classes)`; `forward_features` gives the
    map of each stage, at strides 16, 32, 64. Everything is convolution and batch norm, which `fuse()` folds together
    for inference. Cost O((HW/1024)²) in the attention. Source: arXiv 2401.16456 (ysj9909/SHViT).

    Args:
        dims, depths: of each stage. widths: channels that attend, in each stage. key_dim: of queries and keys.
        attends: which stages attend; the paper's first stage has convolutions alone.
        distilled: a second head, whose logits are averaged in evaluation and returned beside the first's in training.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (128, 224, 320),
        depths: Sequence[int] = (2, 4, 5),
        widths: Sequence[int] = (32, 48, 68),
        key_dim: int | Sequence[int] = 16,
        attends: Sequence[bool] = (False, True, True),
        distilled: bool = False,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        stages = len(dims)
        keys = [key_dim] * stages if isinstance(key_dim, int) else key_dim
        if not len(widths) == len(keys) == len(attends) == stages:
            raise ValueError(
                f"dims, widths, key_dim and attends need one entry per stage, got {stages}, {len(widths)}, {len(keys)} "
                f"and {len(attends)}"
            )
        if dims[0] % 8:
            raise ValueError(f"dims must begin with a multiple of 8, got {dims[0]}")

        def block(place: Place) -> nn.Module:
            at = place.stage
            mixer = SingleHeadAttention(place.dim, width=widths[at], key_dim=keys[at]) if attends[at] else None
            return SingleHeadBlock(place.dim, mixer, drop_path=place.drop_path)

        super().__init__(
            dims=dims,
            depths=depths,
            strides=(16, *(2,) * (stages - 1)),
            stem=Stem(in_channels, dims[0]),
            downsample=Shrink,
            block=block,
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
        )
        classifies = bool(num_classes)
        self.head_norm: nn.Module = nn.BatchNorm1d(dims[-1]) if classifies else nn.Identity()
        self.second_norm: nn.Module | None = nn.BatchNorm1d(dims[-1]) if classifies and distilled else None
        self.second_head = nn.Linear(dims[-1], num_classes) if classifies and distilled else None
        for head in (self.head, self.second_head):
            if isinstance(head, nn.Linear):
                nn.init.trunc_normal_(head.weight, std=0.02)
                nn.init.zeros_(head.bias)

    def forward_head(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        x = x.mean((2, 3))
        first = self.head(self.head_norm(x))
        if self.second_head is None or self.second_norm is None:
            return first
        second = self.second_head(self.second_norm(x))
        return (first, second) if self.training else (first + second) / 2

    def fuse(self) -> SHViT:
        """Fold all batch norms and residual kernels into convolutions, in place; in evaluation, and for it alone."""
        fold_norms(self)
        for head, norm in ((self.head, "head_norm"), (self.second_head, "second_norm")):
            if isinstance(head, nn.Linear) and isinstance(bn := getattr(self, norm), nn.BatchNorm1d):
                _fold_before(bn, head)
                setattr(self, norm, nn.Identity())
        return self


@torch.no_grad()
def _fold_before(norm: nn.BatchNorm1d, head: nn.Linear) -> None:
    """Fold the batch norm of a linear layer's input into the layer."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = norm.weight * (variance + norm.eps).rsqrt()
    head.bias.add_(head.weight @ (norm.bias - mean * scale))
    head.weight.mul_(scale)
