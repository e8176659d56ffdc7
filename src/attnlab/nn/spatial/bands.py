"""A small window around each place of a map, row by row: scores of its keys, and sums of its values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 16  # places of a row that share one product; more waste arithmetic, fewer copy keys more often


def pieces(width: int) -> tuple[int, int]:
    """How many pieces a row of `width` places is cut into, and how long each is (the last may overhang)."""
    number = -(-width // PIECE)
    return number, -(-width // number)


def bands(maps: Tensor, window: int) -> Tensor:
    """All places in sight of each piece: `(B, H, Y, X, D)` → `(B, H, Y, pieces, window · (length + window − 1), D)`.

    Zeros stand outside the map.
    """
    number, length = pieces(maps.shape[3])
    reach, over = window // 2, number * length - maps.shape[3]
    padded = F.pad(maps, (0, 0, reach, reach + over, reach, reach))
    rows, columns = maps.shape[2], length + window - 1
    cut = [padded[:, :, :, i * length : i * length + columns] for i in range(number)]
    around = torch.stack([torch.stack([c[:, :, w : w + rows] for c in cut], 3) for w in range(window)], 4)
    return around.flatten(4, 5)


def diagonal(scores: Tensor, window: int) -> Tensor:
    """Of `(…, length, window · (length + window − 1))`, what each place has in its own window: `(…, length, window²)`.

    A view, with the last axis in two: place i's window begins at column i of each row.
    """
    length = scores.shape[-2]
    shape = (*scores.shape[:-1], window, window)
    return scores.as_strided(shape, (*scores.stride()[:-2], scores.stride(-2) + 1, length + window - 1, 1))


def window_scores(q: Tensor, k: Tensor, window: int) -> Tensor:
    """q_i · k_j of the places j in the window around each i: maps `(B, H, Y, X, D)` → `(B, H, Y, X, window²)`."""
    number, length = pieces(q.shape[3])
    over = number * length - q.shape[3]
    q = F.pad(q, (0, 0, 0, over)) if over else q
    scores = q.unflatten(3, (number, length)) @ bands(k, window).mT
    return diagonal(scores, window).flatten(3, 4)[:, :, :, : k.shape[3]].flatten(-2)


def window_sum(weights: Tensor, v: Tensor, window: int) -> Tensor:
    """Σ_j w_ij v_j over the same windows: `(B, H, Y, X, window²)` and maps `(B, H, Y, X, D)` → `(B, H, Y, X, D)`."""
    number, length = pieces(v.shape[3])
    over = number * length - v.shape[3]
    weights = F.pad(weights, (0, 0, 0, over)) if over else weights
    weights = weights.unflatten(-1, (window, window)).unflatten(3, (number, length))
    spread = weights.new_zeros(*weights.shape[:5], window * (length + window - 1))
    diagonal(spread, window).copy_(weights)
    return (spread @ bands(v, window)).flatten(3, 4)[:, :, :, : v.shape[3]]
