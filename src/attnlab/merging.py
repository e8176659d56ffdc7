"""Softmax attention over disjoint sets of keys, joined by its log-sum-exp. Imports torch alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join softmax attention over disjoint key sets: what one softmax over all of them gives.

        lse = log Σ_p exp(lse_p)        out = Σ_p exp(lse_p − lse) out_p

    Args:
        parts: pairs `(out (B, H, Nq, Dv), lse (B, H, Nq))` as `attend(..., return_lse=True)` returns them.

    Returns:
        `(out, lse)` of the union. Queries that see no key in any part stay zero.
    """
    if not parts:
        raise ValueError("parts must hold at least one (out, lse) pair")
    for out, lse in parts:
        if out.shape[:-1] != lse.shape:
            raise ValueError(
                f"lse must have out's shape without the last axis, got {tuple(lse.shape)} for {tuple(out.shape)}"
            )
    each = torch.stack([lse for _, lse in parts])
    # Rows with no key at all are −inf in every part; a finite stand-in keeps exp and its gradient away from NaN.
    dead = (each == -math.inf).all(0)
    total = torch.logsumexp(each.masked_fill(dead, 0.0), 0)
    shares = (each - total).exp().masked_fill(dead, 0.0)
    joined = torch.stack(
        [out * share.unsqueeze(-1).to(out.dtype) for (out, _), share in zip(parts, shares, strict=True)]
    )
    return joined.sum(0), total.masked_fill(dead, -math.inf)
