"""A gated channel mixer that looks at its neighbours (TransNeXt, AttNet)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.nn.fused import linear, product


class ConvGLU(nn.Module):
    """A gated MLP whose gate sees the 3×3 places around its own: a channel mixer that also knows where things are.

        u, v = fc1(x) in two;  y = fc2(gelu(dwconv3×3(u)) ⊙ v)         u, v of `hidden` channels

    `(B, H, W, C)` → the same, cost O(N C hidden). Source: arXiv 2311.17132, whose hidden width is two thirds of an
    MLP's, for the same number of parameters. Without `conv` it is a plain gated MLP; `norm` adds an RMS norm before
    fc2, as AttNet has it (arXiv 2510.20092).
    """

    def __init__(self, dim: int, hidden: int, *, conv: bool = True, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden) if conv else nn.Identity()
        self.norm = nn.RMSNorm(hidden, eps=1e-6) if norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        # Two products, so that what is convolved lies together in memory.
        (top, low), (first, second) = self.fc1.weight.chunk(2), self.fc1.bias.chunk(2)
        u, v = product(x, top, first), product(x, low, second)
        gate = self.conv(u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.dropout(linear(self.dropout(self.norm(F.gelu(gate) * v)), self.fc2))
