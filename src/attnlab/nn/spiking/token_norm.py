"""Batch norm of channels that lie last."""

from __future__ import annotations

from torch import Tensor, nn


class TokenNorm(nn.BatchNorm1d):
    """Batch norm over all axes but the last: `(…, C)` to the same, with no transpose. Nothing in, nothing out."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape) if x.numel() else x
