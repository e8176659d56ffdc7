"""The pyramid: a backbone in stages of shrinking maps; a network is a size table and the blocks that it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from operator import mul
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnlab import cards
from attnlab.models.skeletons.parts import (
    MLP,
    Downsample,
    DropPath,
    Norm,
    drop_path_rates,
    residual,
    trunc_normal_linear,
)
from attnlab.nn.by_rows import by_rows

Layout = Literal["NCHW", "NHWC", "tokens"]
_LAYOUTS = ("NCHW", "NHWC", "tokens")


@dataclass(frozen=True)
class Place:
    """Where in the pyramid a block stands: what a network needs to know to build it."""

    stage: int
    index: int  # within its stage
    dim: int
    input_dim: int  # differs from `dim` only where the block itself changes the width (no downsample slot)
    stride: int  # not 1 only where the block itself shrinks the map (no downsample slot)
    drop_path: float


class Block(nn.Module):
    """Mix places, then channels, each on a residual path with its norm, layer scale and stochastic depth.

        x = x + local(x)                                        if `local` is given (a position convolution)
        x = x + drop_path(scale1 · mixer(norm1(x)))             post_norm: norm1(mixer(x))
        x = x + drop_path(scale2 · mlp(norm2(x)))               post_norm: norm2(mlp(x))

    `(B, C, H, W)` to the same, computed in channels-last memory, so that no layout costs a copy.

    Args:
        mixer: a feature mechanism (layout "NCHW"), a module on `(B, H, W, C)` ("NHWC"), or a token mechanism
            ("tokens": called as `mixer(x, grid=(H, W))` with `(B, H·W, C)`).
        mlp: the hidden width's ratio to `dim`, or a module on `(B, H, W, C)`.
        layer_scale: start value of the learned scale per channel (CaiT, arXiv 2103.17239); None for none.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        layout: Layout = "NCHW",
        mlp: float | nn.Module = 4.0,
        norm: Norm = nn.LayerNorm,
        post_norm: bool = False,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        local: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if layout not in _LAYOUTS:
            raise ValueError(f"layout must be one of {_LAYOUTS}, got {layout!r}")
        self.layout, self.post_norm = layout, post_norm
        self.local = local
        self.norm1, self.mixer = norm(dim), mixer
        self.norm2, self.mlp = norm(dim), mlp if isinstance(mlp, nn.Module) else MLP(dim, int(dim * mlp))
        self.drop_path = DropPath(drop_path)
        self.scale1: Tensor | None
        self.scale2: Tensor | None
        for name in ("scale1", "scale2"):
            scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
            self.register_parameter(name, scale)

    def mix(self, x: Tensor) -> Tensor:
        """The mixer on `(B, H, W, C)`, in the layout that it wants."""
        if self.layout == "NHWC":
            return self.mixer(x)
        if self.layout == "tokens":
            return self.mixer(x.flatten(1, 2), grid=(x.shape[1], x.shape[2])).reshape(x.shape)
        return self.mixer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.local is not None:
            x = x + self.local(x)
        x = x.permute(0, 2, 3, 1)
        y = self.norm1(self.mix(x)) if self.post_norm else self.mix(self.norm1(x))
        return by_rows(self.after, x, y, through=(self.norm2, self.mlp, self.drop_path)).permute(0, 3, 1, 2)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The block behind its mixer, whose output for `x` is `y`; both `(…, C)`."""
        x = residual(x, self.drop_path(y), self.scale1)
        y = self.norm2(self.mlp(x)) if self.post_norm else self.mlp(self.norm2(x))
        return residual(x, self.drop_path(y), self.scale2)


def around(mixer: str, *, options: Mapping[str, Any] | None = None, **block: Any) -> Callable[[Place], nn.Module]:
    """For `Pyramid(block=…)`: a `Block(**block)` around the mechanism registered as `mixer`, built with `options`.

    Feature and token mechanisms alike: `Pyramid(dims=(64, 128), …, block=around("focal", options={"levels": 3}))`.
    """
    kind = cards.describe(mixer).kind
    if kind not in (cards.FEATURES, cards.TOKENS):
        raise ValueError(f"mixer must name a feature or token mechanism, {mixer!r} is of kind {kind.value!r}")
    layout: Layout = "NCHW" if kind is cards.FEATURES else "tokens"

    def build(place: Place) -> nn.Module:
        module = cards.build(mixer, place.dim, **(options or {}))
        return Block(place.dim, module, layout=layout, drop_path=place.drop_path, **block)

    return build


class Stage(nn.Module):
    """Shrink the map (where there is a `downsample`), then run the blocks, then the `norm`, if there is one."""

    def __init__(
        self, downsample: nn.Module | None, blocks: Sequence[nn.Module], norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x if self.downsample is None else self.downsample(x))
        return x if self.norm is None else self.norm(x)


class Pyramid(nn.Module):
    """A vision backbone: stem → stages of blocks, the map shrinking between them → norm → mean over places → head.

        logits = pyramid(images)                        (B, 3, H, W), any H and W, to (B, num_classes)
        maps = pyramid.forward_features(images)         per stage one (B, channels[i], ~H/reductions[i], …)

    Maps are `(B, C, H, W)` in channels-last memory throughout.

    Args:
        dims, depths: width and number of blocks of each stage.
        strides: how much the stem, then each later stage's downsample, shrinks the map.
        stem: image → map of `stem_dim` channels (default `dims[0]`); by default patches, `Downsample` of `strides[0]`.
        block: builds the block that stands at a `Place`; `around(name)` does it for any registered mechanism.
        downsample: builds what opens stage i ≥ 1 from (dim, out_dim, stride); None where blocks do it themselves.
        stage_norm: builds, from a width, what closes each stage, so that `forward_features` gives it; None for none.
        norm: map → map of `head_dim` channels (default `dims[-1]`) before pooling; None for none.
        num_classes: 0 for no head: `forward` then returns the pooled features.
        drop_path: rate at the last block; rises linearly from 0.
        dropout: before the head's linear layer.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        block: Callable[[Place], nn.Module],
        strides: Sequence[int] = (4, 2, 2, 2),
        stem: nn.Module | None = None,
        stem_dim: int | None = None,
        downsample: Callable[[int, int, int], nn.Module] | None = Downsample,
        stage_norm: Callable[[int], nn.Module] | None = None,
        norm: nn.Module | None = None,
        head_dim: int | None = None,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not len(dims) == len(depths) == len(strides):
            raise ValueError(
                f"dims, depths and strides need one entry per stage, got {len(dims)}, {len(depths)} and {len(strides)}"
            )
        self.in_channels, self.channels = in_channels, tuple(dims)
        self.reductions = tuple(accumulate(strides, mul))
        self.stem = Downsample(in_channels, dims[0], strides[0]) if stem is None else stem

        rates = iter(drop_path_rates(drop_path, sum(depths)))
        self.stages = nn.ModuleList()
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            before, stride = (dims[stage - 1], strides[stage]) if stage else (stem_dim or dim, 1)
            down = downsample(before, dim, stride) if stage and downsample is not None else None
            places = [
                Place(stage, index, dim, before, stride, rate)
                if index == 0 and downsample is None
                else Place(stage, index, dim, dim, 1, rate)
                for index, rate in enumerate(islice(rates, depth))
            ]
            last = stage_norm(dim) if stage_norm is not None else None
            self.stages.append(Stage(down, [block(place) for place in places], last))
        self.norm = norm
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(head_dim or dims[-1], num_classes) if num_classes else nn.Identity()

    def init_weights(self) -> None:
        self.apply(trunc_normal_linear)

    def embed(self, x: Tensor) -> Tensor:
        """Images through the stem."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be images (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        if min(x.shape[-2:]) < self.reductions[-1]:
            raise ValueError(
                f"x must be at least {self.reductions[-1]} pixels high and wide, got {tuple(x.shape[-2:])}"
            )
        return self.stem(x.contiguous(memory_format=torch.channels_last))

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The map after each stage: `channels[i]` channels, about 1/`reductions[i]` of the image's size."""
        x = self.embed(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward_head(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes)` from the last stage's map."""
        x = x if self.norm is None else self.norm(x)
        return self.head(self.dropout(x.mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x)[-1])
