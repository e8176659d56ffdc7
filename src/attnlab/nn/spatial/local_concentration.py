"""The local concentration module (L²ViT): gathers again what linear attention has spread over the whole map."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, FEATURES, Card, register
from attnlab.nn.depthwise import DepthwiseConv


@register(
    Card(
        name="local_concentration",
        title="The Linear Attention Resurrection in Vision Transformer",
        paper="2501.16182",
        system="l2vit",
        family="spatial",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N k²",
        growth=1.0,
    )
)
class LocalConcentration(nn.Module):
    """Two depthwise convolutions with what makes them more than one between: attention that is flat becomes local.

        y = dwconv(bn(gelu(dwconv(x))))        k×k kernels

    `(B, C, H, W)` to the same, any size. Cost: 4NCk². Source: arXiv 2501.16182.
    """

    def __init__(self, dim: int, *, kernel: int = 7) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        self.dim = dim
        self.conv1 = DepthwiseConv(dim, kernel)
        self.norm = nn.BatchNorm2d(dim)
        self.conv2 = DepthwiseConv(dim, kernel)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        return self.conv2(self.norm(F.gelu(self.conv1(x))))
