"""A gated channel mixer that looks at its neighbours (TransNeXt, AttNet)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.nn.fused import linear, product
from attnlab.nn.untouched import untouched

_EPS = 1e-6


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
        self.norm = nn.RMSNorm(hidden, eps=_EPS) if norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        # Two products, so that what is convolved lies together in memory.
        (top, low), (first, second) = self.fc1.weight.chunk(2), self.fc1.bias.chunk(2)
        u, v = product(x, top, first), product(x, low, second)
        gate = self.conv(u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        hidden = F.gelu(gate)
        hidden = hidden * v if torch.is_grad_enabled() else hidden.mul_(v)
        return self.dropout(self.second(hidden))

    def second(self, x: Tensor) -> Tensor:
        """fc2 of the normed x."""
        norm, fc2 = self.norm, self.fc2
        dropped = self.training and self.dropout.p > 0
        if type(norm) is not nn.RMSNorm or type(fc2) is not nn.Linear or dropped or not untouched(x, norm, fc2):
            return linear(self.dropout(norm(x)), fc2)
        # The norm's weights go into the layer's, and its division behind the layer, where there are fewer numbers.
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
        return torch.addcmul(fc2.bias, product(x, fc2.weight * norm.weight, None), (square + _EPS).rsqrt())
