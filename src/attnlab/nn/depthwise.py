"""Depth-wise convolutions that keep the map's size, at any dilation fast, and their gradients at any kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.nn.untouched import recorded, untouched

_STRIP = 3  # the widest kernel whose weight's gradient the CPU library knows how to do fast


class DepthwiseConv(nn.Conv2d):
    """One `kernel`×`kernel` filter per channel, zeros beyond the border: `(B, C, H, W)` to the same.

    With a dilation r, places of one residue (row mod r, column mod r) see no others. So on a CPU, whose libraries are
    slow at dilated depth-wise convolutions, the r² residues become maps of their own with an ordinary convolution:
    the same numbers, many times faster for large kernels. Cost: N·C·kernel².
    """

    def __init__(self, dim: int, kernel: int, *, dilation: int = 1, bias: bool = True) -> None:
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, to keep the map's size, got {kernel}")
        if dilation < 1:
            raise ValueError(f"dilation must be at least 1, got {dilation}")
        padding = dilation * (kernel // 2)
        super().__init__(dim, dim, kernel, padding=padding, dilation=dilation, groups=dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        r, (height, width) = self.dilation[0], x.shape[2:]
        if self.kernel_size[0] == 1 or x.device.type != "cpu":
            return super().forward(x)
        if r == 1:
            return depthwise(x, self.weight, self.bias)
        h, w = -(-height // r), -(-width // r)
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, w * r - width, 0, h * r - height))
        x = x.unflatten(2, (w, r)).unflatten(1, (h, r)).permute(0, 2, 4, 1, 3, 5).reshape(-1, h, w, self.groups)
        x = depthwise(x.permute(0, 3, 1, 2), self.weight, self.bias)
        x = x.permute(0, 2, 3, 1).unflatten(0, (-1, r, r)).permute(0, 3, 1, 4, 2, 5).flatten(3, 4).flatten(1, 2)
        return x[:, :height, :width].permute(0, 3, 1, 2)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The depth-wise convolution of `(B, C, H, W)` with odd kernels `(C, 1, h, w)` that keeps the map's size."""
    if weight.shape[3] > _STRIP and x.ndim == 4 and recorded(weight) and untouched(x):
        return _Depthwise.apply(x, weight, bias)
    return _convolve(x, weight, bias)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, 1, (weight.shape[2] // 2, weight.shape[3] // 2), 1, len(weight))


class _Depthwise(torch.autograd.Function):
    """The same, with the weight's gradient in strips of the kernel, for it is many times slower in one (CPU)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolve(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (to_x, _, to_bias) = ctx.saved_tensors, ctx.needs_input_grad
        height, width = weight.shape[2] // 2, weight.shape[3] // 2

        def gradients(x: Tensor, weight: Tensor, padding: list[int], wanted: list[bool]) -> tuple[Tensor, ...]:
            return torch.ops.aten.convolution_backward(
                grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], len(weight), wanted
            )

        dx = gradients(x, weight, [height, width], [True, False, False])[0] if to_x else None
        wide, strips = F.pad(x, (width, width)), weight.split(_STRIP, 3)
        seen = [wide[..., i * _STRIP :][..., : x.shape[3] + s.shape[3] - 1] for i, s in enumerate(strips)]
        parts = [gradients(a, s, [height, 0], [False, True, False])[1] for a, s in zip(seen, strips, strict=True)]
        return dx, torch.cat(parts, 3), grad.sum((0, 2, 3)) if to_bias else None
