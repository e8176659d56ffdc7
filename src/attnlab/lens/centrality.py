"""What a matrix of attention says as a graph: sums over walks, expected visits, and who is central.

For A `(…, N, N)`, not negative, A_ij what token i takes from token j: the readings of infinite self-attention
(arXiv 2603.00175, after Infinite Feature Selection).
"""

from __future__ import annotations

import torch
from torch import Tensor


def walks(a: Tensor, gamma: float = 1.0, *, hops: int | None = None) -> Tensor:
    """Σ_{k≥1} γᵏ Aᵏ: all walks from i to j, longer ones discounted; the first `hops` powers if given.

    The whole sum is (I − γA)⁻¹ − I, which wants γ · (spectral radius of A) < 1: a Frobenius norm of 1 and γ < 1 do.
    """
    _check(a)
    if hops is not None:
        if hops < 1:
            raise ValueError(f"hops must be at least 1, got {hops}")
        step = gamma * a
        total = step
        for _ in range(hops - 1):
            total = step + step @ total
        return total
    radius = torch.linalg.eigvals(a.double()).abs().amax()
    if gamma * radius >= 1:
        raise ValueError(
            f"gamma times the spectral radius must be below 1 for the sum to converge, got {gamma * radius}"
        )
    unit = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.linalg.solve(unit - gamma * a, unit) - unit


def katz(a: Tensor, gamma: float = 1.0) -> Tensor:
    """Katz centrality `(…, N)`: for each token, the discounted walks that begin at it, row sums of `walks`."""
    return walks(a, gamma).sum(-1)


def expected_visits(a: Tensor, gamma: float) -> Tensor:
    """(I − γP)⁻¹ with P the rows of A scaled to sum 1: how often a walk from i visits j before it stops.

    The walk stops with probability 1 − γ before each step; rows sum to 1 / (1 − γ). A row of zeros ends the walk.
    """
    _check(a)
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma must be in [0, 1), got {gamma}")
    sums = a.sum(-1, keepdim=True)
    p = torch.where(sums > 0, a / sums.clamp(min=torch.finfo(a.dtype).tiny), 0.0)
    unit = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.linalg.solve(unit - gamma * p, unit)


def dominant(a: Tensor, *, iterations: int = 100, left: bool = False) -> Tensor:
    """The eigenvector of the largest eigenvalue `(…, N)`, by power iteration, not negative and of norm 1.

    `left` for that of Aᵀ: a token is central if central tokens look at it.
    """
    _check(a)
    a = a.mT if left else a
    vector = torch.full_like(a[..., :1], a.shape[-1] ** -0.5)
    for _ in range(iterations):
        vector = torch.nn.functional.normalize(a @ vector, dim=-2)
    return vector.squeeze(-1)


def _check(a: Tensor) -> None:
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"a must be square, (…, N, N), got {tuple(a.shape)}")
    if bool((a < 0).any()):
        raise ValueError("a must not be negative: it is a graph of affinities")
