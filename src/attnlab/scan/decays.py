"""Scores that decay with distance, as products of numbers between 0 and 1.

A chunk of C tokens needs, for every pair i ≥ j, Σ_d rows_id · k_jd · Π_{j < l ≤ i} a_ld with a = e^decay. Splitting
each block of the chunk in halves gives one small product per level: for i in the later half and j in the earlier one
the factor is (product from the start of the later half up to i) · (product from after j to the end of the earlier
half). Both are products of decays, so nothing overflows, no difference of large sums is rounded, and a decay of exactly
0 is allowed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import hardshrink, threshold


def negligible(dtype: torch.dtype) -> float:
    """What is nothing even beside the rounding error of 1."""
    return torch.finfo(dtype).eps ** 2


class Decays:
    """The running products of `a` (R, C, D) within blocks of 1, 2, 4, … C tokens (C a power of two).

    `levels[n]` holds, for blocks of h = 2ⁿ tokens taken in pairs, `late` (R·C/2h, h, D): the product from the start of
    the later block up to each of its tokens, inclusive; and `early`, of the same shape: the product from after each
    token of the earlier block to that block's end. `prefix` and `suffix` (R, C, D) are the same for the whole chunk.
    """

    def __init__(self, a: Tensor) -> None:
        rows, size, width = a.shape
        # Anything smaller is nothing beside a token's own contribution, and products of such factors would soon be
        # denormal numbers, with which matrix products are a hundred times slower.
        floor = negligible(a.dtype)
        prefix = threshold(a, floor, 0.0)
        suffix = torch.ones_like(a)
        self.levels: list[tuple[Tensor, Tensor]] = []
        half = 1
        while half < size:
            pairs = (rows * size // (2 * half), 2, half, width)
            before, late = prefix.view(pairs).unbind(1)
            early, after = suffix.view(pairs).unbind(1)
            self.levels.append((late, early))
            prefix = torch.cat([before, threshold(late * before[:, -1:], floor, 0.0)], dim=1)
            suffix = torch.cat([threshold(early * late[:, -1:], floor, 0.0), after], dim=1)
            half *= 2
        self.prefix = prefix.view(a.shape)
        self.suffix = suffix.view(a.shape)


def corners(square: Tensor, half: int) -> Tensor:
    """View the blocks (later half × earlier half) on the diagonal of `square` (R, C, C): (R, half, half, C / 2half)."""
    rows, size, _ = square.shape
    count = size // (2 * half)
    blocks = square.view(rows, count, 2 * half, count, 2 * half).diagonal(0, 1, 3)
    return blocks[:, half:, :half]


def stacked_corners(square: Tensor, half: int) -> Tensor:
    """The corners as matrices in the order of a level's pairs: (R·C/2half, half, half)."""
    return corners(square, half).permute(0, 3, 1, 2).reshape(-1, half, half)


def decayed_scores(rows: Tensor, k: Tensor, decays: Decays) -> Tensor:
    """Σ_d rows_id k_jd Π_{j<l≤i} a_ld for i > j, and 0 elsewhere: (R, C, C)."""
    count, size, width = k.shape
    scores = k.new_zeros(count, size, size)
    half = 1
    for late, early in decays.levels:
        pairs = (-1, 2, half, width)
        block = (rows.view(pairs)[:, 1] * late) @ (k.view(pairs)[:, 0] * early).mT
        corners(scores, half).copy_(block.view(count, -1, half, half).permute(0, 2, 3, 1))
        half *= 2
    return scores


def decayed_scores_backward(
    d_squares: list[Tensor], rows: list[Tensor], k: Tensor, decays: Decays, d_prefix: Tensor, d_suffix: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of each of `rows`, of k and of log a, all (R, C, D).

    `d_squares` are the gradients of each `decayed_scores(rows, k, decays)`; `d_prefix` and `d_suffix` those of the
    logarithms of the chunk's prefix and suffix (overwritten).
    """
    d_rows, dk = [torch.zeros_like(k) for _ in rows], torch.zeros_like(k)
    width = k.shape[-1]
    half = k.shape[1] // 2
    # From the whole chunk down: a block's prefix is made of its halves' products, so their gradients go to the halves.
    for late, early in reversed(decays.levels):
        pairs = (-1, 2, half, width)
        prefix, suffix = d_prefix.view(pairs), d_suffix.view(pairs)
        prefix[:, 0, -1] += prefix[:, 1].sum(1)
        prefix[:, 1, -1] += suffix[:, 0].sum(1)
        low = k.view(pairs)[:, 0] * early
        d_low = torch.zeros_like(low)
        for row, d_row, d_square in zip(rows, d_rows, d_squares, strict=True):
            d_block = stacked_corners(d_square, half)
            high = row.view(pairs)[:, 1] * late
            d_high = d_block @ low
            d_low = torch.baddbmm(d_low, d_block.mT, high)
            d_row.view(pairs)[:, 1].addcmul_(d_high, late)
            prefix[:, 1].addcmul_(d_high, high)
        dk.view(pairs)[:, 0].addcmul_(d_low, early)
        suffix[:, 0].addcmul_(d_low, low)
        half //= 2
    return d_rows, dk, d_prefix


def scalar_scores_backward(d_log: Tensor, d_prefix: Tensor, d_suffix: Tensor) -> Tensor:
    """Gradient of log a (R, C) from those of the logarithms of the weights (R, C, C), prefix and suffix (R, C)."""
    later_or_same = torch.ones_like(d_log[0]).triu()
    # Token l takes part in every pair i ≥ l > j, in the prefixes of i ≥ l and in the suffixes of j < l.
    crossing = (later_or_same @ d_log.tril(-1)).tril(-1).sum(-1)
    return crossing + d_prefix @ later_or_same.T + d_suffix @ later_or_same.triu(1)


def unit_inverse(lower: Tensor) -> Tensor:
    """(I + lower)⁻¹ of strictly lower triangular matrices (R, C, C), from blocks of one row by doubling."""
    rows, size, _ = lower.shape
    # Entries that are nothing beside the diagonal's 1 go, or their products would be denormal numbers (see Decays).
    floor = negligible(lower.dtype)
    lower = hardshrink(lower, floor)
    inverse = lower.new_ones(rows * size, 1, 1)
    half = 1
    while half < size:
        top, bottom = inverse.view(-1, 2, half, half).unbind(1)
        corner = hardshrink(-(bottom @ stacked_corners(lower, half) @ top), floor)
        inverse = torch.cat([torch.cat([top, torch.zeros_like(top)], -1), torch.cat([corner, bottom], -1)], -2)
        half *= 2
    return inverse
