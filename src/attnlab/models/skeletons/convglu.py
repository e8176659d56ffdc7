"""A gated channel mixer that looks at its neighbours (TransNeXt)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ConvGLU(nn.Module):
    """A gated MLP whose gate sees the 3×3 places around its own: a channel mixer that also knows where things are.

        u, v = fc1(x) in two;  y = fc2(gelu(dwconv3×3(u)) ⊙ v)         u, v of `hidden` channels

    `(B, H, W, C)` → the same, cost O(N C hidden). Source: arXiv 2311.17132, whose hidden width is two thirds of an
    MLP's, for the same number of parameters.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.fc1(x).chunk(2, -1)
        gate = self.conv(u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(gate) * v)
