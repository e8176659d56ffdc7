"""Token-aware average pooling: each place is averaged with its neighbours, at a scale of its own choosing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, FEATURES, Card, register


def dilated_mean(x: Tensor, dilation: int) -> Tensor:
    """The mean over 3×3 places that lie `dilation` apart, `(B, C, H, W)` to the same; 0 leaves x as it is.

    Beyond the border are zeros, and the divisor stays 9. Rows first, then columns: four sums in place of nine.
    """
    if dilation < 0:
        raise ValueError(f"dilation must be at least 0, got {dilation}")
    if dilation == 0:
        return x
    height, width = x.shape[-2:]
    x = F.pad(x, (dilation,) * 4)
    near, far = slice(dilation, dilation + height), slice(2 * dilation, None)
    x = x[..., :height, :] + x[..., near, :] + x[..., far, :]
    return (x[..., :width] + x[..., dilation : dilation + width] + x[..., 2 * dilation :]) / 9


@register(
    Card(
        name="tap",
        title="Robustifying Token Attention for Vision Transformers",
        paper="2303.11126",
        system="tap_adl",
        family="spatial",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
    )
)
class TokenPooling(nn.Module):
    """Averages each place's neighbourhood, at a mix of scales that the place itself predicts, so that attention does
    not hang on a few tokens.

        y = Σ_s π_s · pool_s(x)        pool_0 = x, pool_s the 3×3 mean at dilation s
        π = softmax_s(conv3×3(norm(conv3×3(x))) / temperature)        (B, S, H, W), one for all channels

    `(B, C, H, W)` to the same; it stands before the norm of an attention block, whose residual path keeps x itself.
    Cost: O(N C S). Source: arXiv 2303.11126.

    Args:
        scales: S; with 1, y = x.
    """

    def __init__(self, dim: int, *, scales: int = 4, temperature: float = 1.0) -> None:
        super().__init__()
        if dim < 1 or scales < 1 or temperature <= 0:
            raise ValueError(
                f"dim and scales must be at least 1 and temperature above 0, got {dim}, {scales} and {temperature}"
            )
        self.dim, self.scales, self.temperature = dim, scales, temperature
        self.predict = nn.Sequential(
            nn.Conv2d(dim, scales, 3, padding=1, bias=False),
            nn.BatchNorm2d(scales),
            nn.Conv2d(scales, scales, 3, padding=1, bias=False),
        )

    def shares(self, x: Tensor) -> Tensor:
        """π, the share of each scale at each place: (B, S, H, W), summing to 1."""
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        return (self.predict(x) / self.temperature).softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.shares(x)
        y = torch.zeros_like(x)
        for scale in range(self.scales):
            y = torch.addcmul(y, shares[:, scale : scale + 1], dilated_mean(x, scale))
        return y
