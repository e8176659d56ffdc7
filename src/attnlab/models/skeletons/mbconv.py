"""Inverted residual convolutions with squeeze-and-excite, as backbones of convolution and attention have them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.nn.channel.squeeze_excite import SqueezeExcite
from attnlab.nn.conv_norm import Pointwise
from attnlab.nn.fused import product
from attnlab.nn.untouched import untouched


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME": ⌈H/stride⌉ rows, an odd pixel of padding goes below and right."""

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight, self.bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same with a weight and a bias made of its own."""
        pads = [
            max((-(-n // s) - 1) * s + k - n, 0)
            for n, k, s in zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        ]
        if all(p % 2 == 0 for p in pads):
            return F.conv2d(x, weight, bias, self.stride, [p // 2 for p in pads], 1, self.groups)
        x = F.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))
        return F.conv2d(x, weight, bias, self.stride, 0, 1, self.groups)


class MBConv(nn.Module):
    """Norm → 1×1 to `expansion`·`dim` channels → depth-wise 3×3 → squeeze-and-excite → 1×1 to `dim`; plus a shortcut.

    `(B, C, H, W)` to `(B, dim, ⌈H/stride⌉, ⌈W/stride⌉)`. With a stride the shortcut is averaged over 2×2 places, and
    projected where the width changes. As in MaxViT (arXiv 2204.01697): a norm before everything, and the hidden widths
    of expansion and of squeeze-and-excite (dim/4) are relative to the output's.
    """

    def __init__(
        self,
        input_dim: int,
        dim: int,
        *,
        stride: int = 1,
        expansion: float = 4.0,
        drop_path: nn.Module | None = None,
        activation: Callable[[], nn.Module] = nn.GELU,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        if stride == 1 and input_dim != dim:
            raise ValueError(f"input_dim must be dim where stride is 1, got {input_dim} and {dim}")
        hidden = int(dim * expansion)
        self.stride = stride
        self.norm: nn.Module = norm(input_dim)
        self.conv1 = Pointwise(input_dim, hidden, 1, bias=False)
        self.norm1: nn.Module = norm(hidden)
        self.conv2 = SameConv(hidden, hidden, 3, stride, groups=hidden, bias=False)
        self.norm2: nn.Module = norm(hidden)
        self.act = activation()
        self.se = SqueezeExcite(hidden, dim // 4)
        self.conv3 = Pointwise(hidden, dim, 1)
        self.shortcut = Pointwise(input_dim, dim, 1) if input_dim != dim else nn.Identity()
        self.drop_path = nn.Identity() if drop_path is None else drop_path

    def forward(self, x: Tensor) -> Tensor:
        if self.folds(x):
            weight, bias, weight2, bias2 = self.folded()
            y = product(x.permute(0, 2, 3, 1), weight, bias, self.act).permute(0, 3, 1, 2)
            y = self.se(self.act(self.conv2.convolve(y, weight2, bias2)))
        else:
            y = self.act(self.norm1(self.conv1(self.norm(x))))
            y = self.se(self.act(self.norm2(self.conv2(y))))
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return self.shortcut(x) + self.drop_path(self.conv3(y))

    def folds(self, x: Tensor) -> bool:
        """Whether the norms go into the weights on the way: where nothing is trained, and that is less than a pass."""
        parts = (self.norm, self.conv1, self.norm1, self.conv2, self.norm2)
        return (
            not self.training
            and not torch.is_grad_enabled()
            and untouched(x, *parts)
            and x.is_contiguous(memory_format=torch.channels_last)
            and x.shape[0] * x.shape[2] * x.shape[3] >= 4 * x.shape[1]
            and all(type(norm) is nn.BatchNorm2d for norm in (self.norm, self.norm1, self.norm2))
            and (type(self.conv1), type(self.conv2)) == (Pointwise, SameConv)
        )

    def folded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights and biases of the first two convolutions and the norms around them, `(hidden, C)` of the first."""
        (scale, shift), (scale1, shift1), (scale2, shift2) = map(affine, (self.norm, self.norm1, self.norm2))
        rows = self.conv1.weight.flatten(1)
        weight = rows * scale * scale1[:, None]
        return weight, (rows @ shift) * scale1 + shift1, self.conv2.weight * scale2[:, None, None, None], shift2

    @torch.no_grad()
    def fuse(self) -> None:
        """For inference: put the batch norms, with the statistics that they have, into the convolutions beside them."""
        if isinstance(self.norm, nn.Identity):
            return
        weight, bias, weight2, bias2 = self.folded()
        self.conv1.bias, self.conv2.bias = nn.Parameter(bias), nn.Parameter(bias2)
        self.conv1.weight.copy_(weight[:, :, None, None])
        self.conv2.weight.copy_(weight2)
        self.norm = self.norm1 = self.norm2 = nn.Identity()


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The factor and the summand per channel that a batch norm is in evaluation."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
        raise TypeError(f"norm must be a batch norm with running statistics, got {type(norm).__name__}")
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale
