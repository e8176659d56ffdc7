"""SpaRTAN's spatial mixer: two ranges of convolution, what differs from the mean strengthened, each range reweighed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, FEATURES, Card, register
from attnlab.nn.channel.squeeze_excite import SqueezeExcite
from attnlab.nn.conv_norm import ConvNorm


class ConvNormGELU(ConvNorm):
    """A convolution without bias that keeps the size (at stride 1), a batch norm of eps 1e-6, and GELU."""

    def __init__(self, dim: int, out_dim: int, stride: int = 1, *, groups: int = 1, dilation: int = 1) -> None:
        super().__init__(dim, out_dim, 3, stride, groups=groups, dilation=dilation, activation=nn.GELU())
        self.norm.eps = 1e-6


@register(
    Card(
        name="smixer",
        title="SpaRTAN: Spatial Reinforcement Token-based Aggregation Network for Visual Recognition",
        paper="2507.10999",
        family="spatial",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
    )
)
class SMixer(nn.Module):
    """Mixes places by a 3×3 convolution and by two dilated ones, each range's channels reweighed by the whole map.

        p = W1 x,  p = p + γ (p - mean(p))                                   C/2 channels; γ from 1e-5
        y = W2 [se(cna(p)), se(cna₂(conv₂(p)))]                              cna: gelu(bn(conv)); ₂: dilation 2

    `(B, C, H, W)` to the same, any size. The convolutions are dense, or depthwise with `depthwise=True`.
    Cost: O(N(2C² + 27C²/4)). Source: arXiv 2507.10999 (the first dilated convolution has neither norm nor activation).
    """

    def __init__(self, dim: int, *, depthwise: bool = False) -> None:
        super().__init__()
        if dim < 8 or dim % 8:
            raise ValueError(f"dim must be a multiple of 8, got {dim}")
        self.dim, half = dim, dim // 2
        groups = half if depthwise else 1
        self.gamma = nn.Parameter(torch.full((half, 1, 1), 1e-5))
        self.proj = nn.Linear(dim, half)
        self.near = ConvNormGELU(half, half, groups=groups)
        self.far1 = nn.Conv2d(half, half, 3, padding=2, dilation=2, groups=groups, bias=False)
        self.far2 = ConvNormGELU(half, half, groups=groups, dilation=2)
        self.near_se = SqueezeExcite(half, half // 4, activation=nn.ReLU)
        self.far_se = SqueezeExcite(half, half // 4, activation=nn.ReLU)
        self.wo = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        p = self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        p = p + self.gamma * (p - p.mean((2, 3), keepdim=True))
        near, far = self.near_se(self.near(p)), self.far_se(self.far2(self.far1(p)))
        return self.wo(torch.cat((near, far), 1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
