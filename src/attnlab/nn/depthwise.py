"""Depth-wise convolutions that keep the map's size, at any dilation fast."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


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
        r, channels, (height, width) = self.dilation[0], self.groups, x.shape[2:]
        if r == 1 or self.kernel_size[0] == 1 or x.device.type != "cpu":
            return super().forward(x)
        h, w = -(-height // r), -(-width // r)
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, w * r - width, 0, h * r - height))
        x = x.unflatten(2, (w, r)).unflatten(1, (h, r)).permute(0, 2, 4, 1, 3, 5).reshape(-1, h, w, channels)
        x = F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, 1, self.kernel_size[0] // 2, 1, channels)
        x = x.permute(0, 2, 3, 1).unflatten(0, (-1, r, r)).permute(0, 3, 1, 4, 2, 5).flatten(3, 4).flatten(1, 2)
        return x[:, :height, :width].permute(0, 3, 1, 2)
