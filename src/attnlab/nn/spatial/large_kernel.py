"""Large kernel attention (VAN): a map gated by what surrounds it, through a large convolution in three cheap pieces."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, FEATURES, Card, register
from attnlab.nn.depthwise import DepthwiseConv


@register(
    Card(
        name="large_kernel",
        title="Visual Attention Network",
        paper="2202.09741",
        system="van",
        family="spatial",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
    )
)
class LargeKernelAttention(nn.Module):
    """Scales each entry of a map by a convolution of all channels in the 21×21 places around it, in three cheap pieces.

        y = x ⊙ Wm far(near(x))        near: depth-wise (2d-1)×(2d-1); far: depth-wise ⌈K/d⌉×⌈K/d⌉, dilation d

    `(B, C, H, W)` to the same, any size, zeros beyond the border. The gate is linear, with biases, and unbounded: no
    softmax or sigmoid. For K = 21 and d = 3 it sees 23×23 places without holes: (2d-2) + d(⌈K/d⌉-1) + 1.
    Cost: N·C·(C + (2d-1)² + ⌈K/d⌉²). Source: arXiv 2202.09741 (Visual-Attention-Network/VAN-Classification).

    Args:
        kernel, dilation: K and d; ⌈K/d⌉ must be odd.
    """

    def __init__(self, dim: int, *, kernel: int = 21, dilation: int = 3) -> None:
        super().__init__()
        if dilation < 1 or kernel < 1:
            raise ValueError(f"kernel and dilation must be at least 1, got {kernel} and {dilation}")
        if -(-kernel // dilation) % 2 == 0:
            raise ValueError(f"kernel must be an odd number of dilations, rounded up, got {kernel} / {dilation}")
        self.dim = dim
        self.near = DepthwiseConv(dim, 2 * dilation - 1)
        self.far = DepthwiseConv(dim, -(-kernel // dilation), dilation=dilation)
        self.wm = nn.Linear(dim, dim)

    def gate(self, x: Tensor) -> Tensor:
        """What multiplies the map, `(B, C, H, W)`."""
        return self.wm(self.far(self.near(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        return x * self.gate(x)


@register(
    Card(
        name="large_kernel_mixer",
        title="Visual Attention Network",
        paper="2202.09741",
        system="van",
        family="spatial",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
    )
)
class LargeKernelMixer(nn.Module):
    """Large kernel attention between two projections, with a residual path of its own: what VAN's blocks mix with.

        y = x + Wo lka(gelu(Wi x))

    `(B, C, H, W)` to the same, any size. Cost: N·C·(3C + (2d-1)² + ⌈K/d⌉²). Source: arXiv 2202.09741.
    """

    def __init__(self, dim: int, *, kernel: int = 21, dilation: int = 3) -> None:
        super().__init__()
        self.wi = nn.Linear(dim, dim)
        self.lka = LargeKernelAttention(dim, kernel=kernel, dilation=dilation)
        self.wo = nn.Linear(dim, dim)

    def branch(self, x: Tensor) -> Tensor:
        """What is added to x."""
        if x.ndim != 4 or x.shape[1] != self.lka.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.lka.dim}, H, W) and not empty, got {tuple(x.shape)}")
        x = F.gelu(self.wi(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.wo(self.lka(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)
