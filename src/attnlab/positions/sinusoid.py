"""A fixed vector of sines and cosines for each place of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Sinusoid(nn.Module):
    """Adds sines and cosines of the position, from fast to slow, to the token there: x `(B, N, C)` → the same.

        x_n + [sin(n θ_0), sin(n θ_1), …, cos(n θ_0), cos(n θ_1), …]        θ_p = base^(−2p/C)

    No parameters and any length. Source: arXiv 1706.03762, there with sines and cosines in turn.
    """

    def __init__(self, dim: int, *, base: float = 10000.0) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be even, got {dim}")
        self.dim, self.base = dim, base

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """`x` with the vectors of the positions from `offset` on."""
        place = torch.arange(offset, offset + x.shape[1], device=x.device, dtype=torch.float32)
        rate = self.base ** (-torch.arange(0, self.dim, 2, device=x.device, dtype=torch.float32) / self.dim)
        angles = torch.outer(place, rate)
        return x + torch.cat((angles.sin(), angles.cos()), -1).to(x.dtype)
