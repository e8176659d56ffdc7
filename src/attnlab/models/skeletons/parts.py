"""The small pieces that vision skeletons share: norms, MLP, stochastic depth, stems and downsampling."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from attnlab.nn.conv_norm import ConvNorm as ConvNorm
from attnlab.nn.two_layers import two_layers

Norm = Callable[[int], nn.Module]


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map `(B, C, *spatial)`; on channels-last memory it moves no data."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class MLP(nn.Module):
    """`fc2(act(fc1(x)))` over the last axis of any `(…, C)`; `hidden` channels in between."""

    rowwise = True

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: Callable[[], nn.Module] = nn.GELU,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = activation()
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.dropout.p:
            return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))
        return two_layers(x, self.fc1, self.act, self.fc2)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, drops a sample's whole branch with probability `rate`."""

    rowwise = True  # in evaluation

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = x.new_empty((x.shape[0], *(1,) * (x.ndim - 1))).bernoulli_(1.0 - self.rate)
        return x * keep.div_(1.0 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


def residual(x: Tensor, y: Tensor, scale: Tensor | None = None) -> Tensor:
    """x + scale · y, in one pass."""
    return x + y if scale is None else torch.addcmul(x, y, scale)


def drop_path_rates(rate: float, blocks: int) -> list[float]:
    """The usual schedule: from 0 at the first block, linearly, to `rate` at the last."""
    return [rate * i / max(blocks - 1, 1) for i in range(blocks)]


class Downsample(nn.Sequential):
    """A strided convolution and a norm: `(B, C, H, W)` to `(B, out, H/stride, W/stride)`.

    As a stem: patches (`stride=4`), or overlapping ones (`stride=4, kernel=7, padding=2`). Without `kernel`, a patch is
    as large as the stride.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        stride: int = 2,
        *,
        kernel: int | None = None,
        padding: int = 0,
        bias: bool = True,
        norm: Norm | None = ChannelNorm,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel or stride, stride, padding, bias=bias)
        if norm is not None:
            self.norm = norm(out_dim)


class NormFirst(nn.Sequential):
    """Shrink the map as Swin and ConvNeXt do: a norm, then a convolution as large as its stride."""

    def __init__(self, dim: int, out_dim: int, stride: int = 2, norm: Norm = ChannelNorm) -> None:
        super().__init__()
        self.norm = norm(dim)
        self.conv = nn.Conv2d(dim, out_dim, stride, stride)


class ConvStem(nn.Sequential):
    """3×3 convolutions of stride 2 to a quarter of the size, widening from `dims[0]` channels to `dims[-1]`.

    `norm` and `activation` come after each convolution but the last, `last_norm` after the last.
    NAT: `dims=(3, C/2, C)`, no norm and no activation between. BiFormer: batch norms, GELU between.
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        *,
        norm: Norm | None = None,
        activation: Callable[[], nn.Module] | None = None,
        last_norm: Norm | None = ChannelNorm,
        bias: bool = True,
    ) -> None:
        super().__init__()
        for i, (dim, out_dim) in enumerate(pairwise(dims), start=1):
            last = i == len(dims) - 1
            self.add_module(f"conv{i}", nn.Conv2d(dim, out_dim, 3, 2, 1, bias=bias))
            if (make := last_norm if last else norm) is not None:
                self.add_module(f"norm{i}", make(out_dim))
            if activation is not None and not last:
                self.add_module(f"act{i}", activation())


def kaiming_conv(module: nn.Module) -> None:
    """For `Module.apply`: the initialisation of residual conv nets, N(0, 2 / (kernel area · output channels))."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")


def trunc_normal_linear(module: nn.Module, std: float = 0.02) -> None:
    """For `Module.apply`: the initialisation of vision transformers, truncated normal weights and zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
