"""Softmax attention whose queries and keys are narrower than its values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.attend import attend

_WRITTEN_OUT = 1 << 20  # scores that are written out at most: what a cache holds


def attend_thin(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v for q, k `(B, H, N or M, D)` and v `(B, H, M, Dv)`, D ≤ Dv.

    Fused kernels want one width: for them q and k are widened by zeros. On CPU a few scores are written out instead,
    which is faster. Cost: NM(D + Dv), or 2NM·Dv.
    """
    scale = q.shape[-1] ** -0.5
    if q.device.type == "cpu" and q.shape[:-1].numel() * k.shape[-2] <= _WRITTEN_OUT:
        return torch.softmax((q * scale) @ k.mT, -1) @ v
    missing = max(v.shape[-1] - q.shape[-1], 0)
    return attend(F.pad(q, (0, missing)), F.pad(k, (0, missing)), v, scale=scale)
