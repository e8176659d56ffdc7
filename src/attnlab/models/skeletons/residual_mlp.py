"""An MLP with a residual depth-wise convolution between its layers (Super Token ViT, SG-Former)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.models.skeletons.parts import MLP
from attnlab.nn.fused import linear


class ResidualDepthwise(nn.Conv2d):
    """x + dwconv3×3(x) with a bias, on `(B, H, W, C)`; `fuse` makes one convolution of it, for inference."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)
        self.summed = False  # whether the kernel adds x itself

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return y if self.summed else x + y

    @torch.no_grad()
    def fuse(self) -> None:
        if not self.summed:
            self.weight += F.pad(self.weight.new_ones(1, 1), (1, 1, 1, 1))
            self.summed = True


class ResidualMLP(MLP):
    """An MLP whose hidden channels look at their neighbours, on `(B, H, W, C)`.

    u = act(fc1(x)), y = fc2(u + dwconv3×3(u))              Super Token ViT (arXiv 2211.11167)
    u = fc1(x), y = fc2(act(u + dwconv3×3(u)))              with `conv_first`: SG-Former (arXiv 2308.12216)
    """

    def __init__(self, dim: int, hidden: int, *, conv_first: bool = False) -> None:
        super().__init__(dim, hidden)
        self.conv, self.conv_first = ResidualDepthwise(hidden), conv_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(linear(x, self.fc1))) if self.conv_first else self.conv(linear(x, self.fc1, self.act))
        return linear(x, self.fc2)
