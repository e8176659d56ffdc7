"""A convolution with its batch norm, and what a trained network of them needs no longer: `fold_norms`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from attnlab.nn.fused import product

_PLACES = 256  # from which on a 1×1 convolution is faster as a linear layer
_HEAVIER = 8  # times as many weights as numbers in the map, from which on the map is what should be moved
_WORTH = 1 << 17  # numbers in a map from which on a pass over it costs more than a few small operations


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, like: nn.Conv2d, activation: nn.Module | None = None
) -> Tensor:
    """A convolution of the shape of `like`; 1×1 ones over many places in channels-last memory are linear layers.

    Torch moves the weights of all others into the memory order of the map, at each call; where the weights are many and
    the map is small it is the map that is moved, there and back.
    """
    many = x.shape[0] * x.shape[2] * x.shape[3] >= _PLACES
    if isinstance(like, Pointwise) and many and x.is_contiguous(memory_format=torch.channels_last):
        return product(x.permute(0, 2, 3, 1), weight.flatten(1), bias, activation).permute(0, 3, 1, 2)
    moved = weight[0, 0].numel() > 1 and weight.is_contiguous() and weight.numel() >= _HEAVIER * x.numel()
    moved = moved and x.is_contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x.contiguous() if moved else x, weight, bias, like.stride, like.padding, like.dilation, like.groups)
    y = y.contiguous(memory_format=torch.channels_last) if moved else y
    return y if activation is None else activation(y)


class Conv(nn.Conv2d):
    """A convolution, in whichever memory order is the faster (see `convolve`)."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias, self)


class Pointwise(Conv):
    """A 1×1 convolution of stride 1."""


class ConvNorm(nn.Sequential):
    """A convolution, a batch norm, and an activation if given; odd kernels keep the size at stride 1.

    The norm makes the convolution's own bias superfluous; some authors have one all the same.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        groups: int = 1,
        dilation: int = 1,
        activation: nn.Module | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        kind = Pointwise if kernel == stride == groups == 1 else Conv
        self.conv = kind(dim, out_dim, kernel, stride, kernel // 2 * dilation, dilation, groups, bias)
        self.norm = nn.BatchNorm2d(out_dim)
        if activation is not None:
            self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        if not self.folds(x):
            return super().forward(x)
        follow = list(self)[2:]  # the activation, and whatever was added
        y = convolve(x, *self.folded(), self.conv, follow[0] if follow else None)
        for follows in follow[1:]:
            y = follows(y)
        return y

    def folds(self, x: Tensor) -> bool:
        """Whether the norm goes into the weights on the way: in evaluation, where that is less than one more pass."""
        if self.training or type(self.norm) is not nn.BatchNorm2d:
            return False
        places = x.shape[0] * x.shape[2] * x.shape[3] // (self.conv.stride[0] * self.conv.stride[1])
        return places >= 4 * self.conv.weight[0].numel() and places * self.conv.out_channels >= _WORTH

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution and the norm behind it together, in evaluation."""
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # type: ignore[operator, union-attr]
        mean = norm.running_mean if self.conv.bias is None else norm.running_mean - self.conv.bias  # type: ignore[operator]
        bias = norm.bias - mean * scale  # type: ignore[operator]
        return self.conv.weight * scale[:, None, None, None], bias


class ResidualConv(ConvNorm):
    """x + norm(dwconv(x)), `(B, C, H, W)` to the same, for `fold_norms` to make a single convolution of."""

    def __init__(self, dim: int, kernel: int = 3) -> None:
        super().__init__(dim, dim, kernel, groups=dim)
        self.summed = False  # whether the kernel adds x itself

    def forward(self, x: Tensor) -> Tensor:
        if self.summed:
            return self.conv(x)
        if not self.folds(x):
            return x + self.norm(self.conv(x))
        weight, bias = self.folded()
        return convolve(x, weight + self.unit(), bias, self.conv)

    def unit(self) -> Tensor:
        """The kernel that changes nothing."""
        return F.pad(self.conv.weight.new_ones(1, 1), (self.conv.kernel_size[0] // 2,) * 4)


@torch.no_grad()
def fold_norms(module: nn.Module) -> None:
    """Fold each batch norm of a `ConvNorm` in `module` into its convolution, and the sum of a `ResidualConv` too.

    In place, exact to rounding in evaluation; what is folded cannot be trained any more as it was.
    """
    if module.training:
        raise ValueError("fold_norms needs eval(): batch norms in training depend on the batch")
    for part in list(module.modules()):
        if not isinstance(part, ConvNorm) or not isinstance(part.norm, nn.BatchNorm2d):
            continue
        part.conv = fuse_conv_bn_eval(part.conv, part.norm)
        part.norm = nn.Identity()  # type: ignore[assignment]
        if isinstance(part, ResidualConv):
            part.conv.weight += part.unit()
            part.summed = True
