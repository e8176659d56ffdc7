"""A learned vector for each place of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Learned(nn.Module):
    """Adds a learned vector to the token at each of at most `length` positions: x `(B, N, C)` → the same."""

    def __init__(self, length: int, dim: int, *, std: float = 0.02) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.table = nn.Parameter(torch.randn(length, dim) * std)

    @property
    def length(self) -> int:
        return len(self.table)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """`x` with the vectors of the positions from `offset` on."""
        end = offset + x.shape[1]
        if end > self.length:
            raise ValueError(f"the position table has {self.length} places, and {end} tokens were given")
        return x + self.table[offset:end]
