"""Scores that decay with distance, as products of numbers between 0 and 1.

A chunk of C tokens needs, for every pair i > j, Σ_d row_id · k_jd · Π_{j < l ≤ i} a_ld with a = e^decay. Splitting each
block of the chunk in halves gives one small product per level: for i in the later half and j in the earlier one the
factor is (product from the start of the later half up to i) · (product from after j to the end of the earlier half).
Both are products of decays, so nothing overflows, no difference of large sums is rounded, and a decay of exactly 0 is
allowed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import hardshrink


def negligible(dtype: torch.dtype) -> float:
    """What is nothing even beside the rounding error of 1.

    Smaller factors are made 0: products of them would soon be denormal numbers, with which matrix products are a
    hundred times slower.
    """
    return torch.finfo(dtype).eps ** 2


class Decays:
    """The running products of `a` (R, C, D) within blocks of 1, 2, 4, … C tokens (C a power of two).

    `levels[n]` (R·C/2h, 2, h, D) is about blocks of h = 2ⁿ tokens in pairs: for each token of the earlier block the
    product from after it to that block's end, and for each token of the later block the product from that block's start
    up to it. `prefix` (up to and with each token) and `suffix` (after each token) are of the whole chunk, (R, C, D).
    """

    def __init__(self, a: Tensor) -> None:
        rows, size, width = a.shape
        floor = negligible(a.dtype)
        self.prefix, self.suffix = a.clone(), torch.ones_like(a)
        self.levels: list[Tensor] = []
        half = 1
        while half < size:
            pairs = (rows * size // (2 * half), 2, half, width)
            prefix, suffix = self.prefix.view(pairs), self.suffix.view(pairs)
            after = prefix[:, 1, -1:].clone()
            level = prefix.clone()
            level[:, 0].copy_(suffix[:, 0])
            self.levels.append(torch.threshold_(level, floor, 0.0))
            prefix[:, 1].mul_(prefix[:, 0, -1:])
            suffix[:, 0].mul_(after)
            half *= 2
        torch.threshold_(self.prefix, floor, 0.0)
        torch.threshold_(self.suffix, floor, 0.0)


def _corners(square: Tensor, half: int) -> Tensor:
    """Of `square` (R, C, C) the blocks later half × earlier half on the diagonal: a view (R, C/2half, half, half)."""
    rows, size, _ = square.shape
    count = size // (2 * half)
    blocks = square.view(rows, count, 2 * half, count, 2 * half).diagonal(0, 1, 3)
    return blocks[:, half:, :half].permute(0, 3, 1, 2)


def decayed_scores(rows: list[Tensor], k: Tensor, decays: Decays) -> list[Tensor]:
    """Σ_d row_id k_jd Π_{j<l≤i} a_ld for i > j, and 0 elsewhere: (R, C, C) for each of `rows`, all (R, C, D)."""
    count, size, channels = k.shape
    squares = [k.new_zeros(count, size, size) for _ in rows]
    half = 1
    for level in decays.levels:
        early, late = level.unbind(1)
        pairs = (-1, 2, half, channels)
        low = (k.view(pairs)[:, 0] * early).mT
        for row, square in zip(rows, squares, strict=True):
            corners = _corners(square, half)
            corners.copy_(torch.bmm(row.view(pairs)[:, 1] * late, low).view(corners.shape))
        half *= 2
    return squares


def _product(small: Tensor, x: Tensor) -> Tensor:
    """small @ x for small (n, h, h), x (n, h, D): on a CPU, `bmm` of one or two rows is ten times slower than this."""
    if small.shape[1] > 2:
        return torch.bmm(small, x)
    y = small[:, :, :1] * x[:, :1]
    return y if small.shape[1] == 1 else y.addcmul_(small[:, :, 1:], x[:, 1:])


def decayed_scores_backward(
    d_squares: list[Tensor],
    rows: list[Tensor],
    k: Tensor,
    decays: Decays,
    d_rows: list[Tensor],
    dk: Tensor,
    d_prefix: Tensor,
    d_suffix: Tensor,
) -> Tensor:
    """Add the gradients of `decayed_scores` to `d_rows` and `dk`, and return that of log a (R, C, D).

    `d_prefix` and `d_suffix` are the gradients of the logarithms of the chunk's prefix and suffix; all are overwritten.
    """
    half = k.shape[1] // 2
    # From the whole chunk down: a block's prefix is made of its halves' products, so their gradients go to the halves.
    for level in reversed(decays.levels):
        early, late = level.unbind(1)
        pairs = (-1, 2, half, k.shape[2])
        prefix, suffix = d_prefix.view(pairs), d_suffix.view(pairs)
        prefix[:, 0, -1] += prefix[:, 1].sum(1)
        prefix[:, 1, -1] += suffix[:, 0].sum(1)
        low = k.view(pairs)[:, 0] * early
        d_low: Tensor | None = None
        for row, d_row, d_square in zip(rows, d_rows, d_squares, strict=True):
            d_corners = _corners(d_square, half).reshape(-1, half, half)
            high = row.view(pairs)[:, 1] * late
            d_high = _product(d_corners, low)
            more = _product(d_corners.mT, high)
            d_low = more if d_low is None else d_low.add_(more)
            d_row.view(pairs)[:, 1].addcmul_(d_high, late)
            prefix[:, 1].addcmul_(d_high, high)
        if d_low is not None:
            dk.view(pairs)[:, 0].addcmul_(d_low, early)
            suffix[:, 0].addcmul_(d_low, low)
        half //= 2
    return d_prefix


def shared_decay_backward(d_log: Tensor, d_prefix: Tensor, d_suffix: Tensor) -> Tensor:
    """Gradient of log a (R, C), where all channels share one decay.

    `d_log` (R, C, C) is the gradient of the logarithms of the weights between tokens, `d_prefix` and `d_suffix` (R, C)
    those of prefix and suffix.
    """
    later_or_same = torch.ones_like(d_log[0]).triu()
    # Token l takes part in every pair i ≥ l > j, in the prefixes of i ≥ l and in the suffixes of j < l.
    crossing = (later_or_same @ d_log.tril(-1)).tril(-1).sum(-1)
    return crossing + d_prefix @ later_or_same.T + d_suffix @ later_or_same.triu(1)


def unit_inverse(lower: Tensor) -> Tensor:
    """(I + lower)⁻¹ of strictly lower triangular matrices (R, C, C).

    In float64, where the long products of small entries that it is made of do not become denormal numbers.
    """
    eye = torch.eye(lower.shape[-1], dtype=torch.float64, device=lower.device)
    small = hardshrink(lower, negligible(lower.dtype)).double()
    inverse = torch.linalg.solve_triangular(small, eye.expand_as(small), upper=False, unitriangular=True)
    return hardshrink(inverse.to(lower.dtype), negligible(lower.dtype))
