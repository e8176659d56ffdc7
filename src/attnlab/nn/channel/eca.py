"""Efficient channel attention: a gate per channel from a short convolution over the channels' means."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, FEATURES, Card, register


def adaptive_kernel(dim: int, gamma: float = 2.0, b: float = 1.0) -> int:
    """The paper's kernel for `dim` channels: the odd number nearest to |log₂(dim)/γ + b/γ|, ties upward."""
    return 2 * int(abs(math.log2(dim) + b) / gamma / 2) + 1


@register(
    Card(
        name="eca",
        title="ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
        paper="1910.03151",
        system="eca",
        family="channel",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N",
    )
)
class EfficientChannelAttention(nn.Module):
    """Weigh each channel by what it and its neighbours hold on average: a gate of `kernel` weights in all.

        z = mean of x over all places                      (B, C)
        y = x · σ(Σⱼ wⱼ z_{c+j-⌊k/2⌋})                     zero padding at the first and last channel, no bias

    `(B, C, *spatial)` to the same, any number of spatial axes. Cost: O(N·C) reads, B·C·k multiplications.
    Source: arXiv 1910.03151.

    Args:
        kernel: odd number of channels that a gate sees; None for the paper's `adaptive_kernel(dim)`.
        shared: False gives each channel weights of its own, C·k in all (the paper's ablation ECA-NS).
    """

    def __init__(self, dim: int, *, kernel: int | None = None, shared: bool = True) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        kernel = adaptive_kernel(dim) if kernel is None else kernel
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 1, got {kernel}")
        self.dim, self.kernel, self.shared = dim, kernel, shared
        bound = kernel**-0.5  # as nn.Conv1d initialises such a kernel
        self.weight = nn.Parameter(torch.empty(1 if shared else dim, 1, kernel).uniform_(-bound, bound))

    def gate(self, x: Tensor) -> Tensor:
        """The gates `(B, C)`, each in (0, 1)."""
        z = x.mean(tuple(range(2, x.ndim)))
        if self.shared:
            return F.conv1d(z[:, None], self.weight, padding=self.kernel // 2)[:, 0].sigmoid()
        windows = F.pad(z, (self.kernel // 2, self.kernel // 2)).unfold(1, self.kernel, 1)
        return (windows * self.weight[:, 0]).sum(-1).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 3 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, *spatial) and not empty, got {tuple(x.shape)}")
        return x * self.gate(x).view(*x.shape[:2], *(1,) * (x.ndim - 2))

    def extra_repr(self) -> str:
        return f"{self.dim}, kernel={self.kernel}" + ("" if self.shared else ", shared=False")
