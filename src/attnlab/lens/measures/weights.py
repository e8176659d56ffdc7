"""What attention weights say of a head: how widely it looks, how far, at what, and whether it looks like another.

Each takes weights `(…, Nq, Nk)`, or a `Record`: then the answer has its layers in front, `(L, …)`. A record of
statistics answers without any weights where they were summed up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Recorded(Protocol):
    """What these functions ask of a record."""

    def measured(self, field: str | None, compute: Callable[[Tensor, dict[str, Any]], Tensor]) -> Tensor:
        """For all layers: what was summed up under `field`, or `compute` of the weights and of where tokens stand."""
        ...


def entropy(weights: Tensor | Recorded) -> Tensor:
    """−Σ_j w_ij ln w_ij of each query, `(…, Nq)`, in nats: 0 for one key, ln n for n keys alike."""
    if not isinstance(weights, Tensor):
        return weights.measured("entropy", lambda w, _: entropy(w))
    _check(weights)
    # 1 in the place of 0 has the logarithm that is wanted, and a gradient.
    return -(weights * weights.masked_fill(weights == 0, 1.0).log()).sum(-1)


def normalised_entropy(weights: Tensor | Recorded, allowed: Tensor | None = None) -> Tensor:
    """Entropy over its largest value, ln n, `(…, Nq)`: from 0 to 1 whatever the number n of keys that a query may see.

    Without `allowed` (bool, broadcastable to the weights) these are the keys with a weight above zero. A query with one
    key has 0.
    """
    if not isinstance(weights, Tensor):
        return weights.measured(None, lambda w, _: normalised_entropy(w, allowed))
    seen = weights > 0 if allowed is None else allowed.expand_as(weights)
    most = seen.sum(-1).clamp_min(1).to(weights.dtype).log()
    return torch.where(most > 0, entropy(weights) / most.masked_fill(most == 0, 1.0), 0.0)


def max_weight(weights: Tensor | Recorded) -> Tensor:
    """max_j w_ij of each query, `(…, Nq)`: 1 where it looks at one key."""
    if not isinstance(weights, Tensor):
        return weights.measured("max", lambda w, _: max_weight(w))
    _check(weights)
    return weights.amax(-1)


def received(weights: Tensor | Recorded) -> Tensor:
    """Σ_i w_ij: how much each key is looked at, `(…, Nk)`; over the keys it sums to the number of queries."""
    if not isinstance(weights, Tensor):
        return weights.measured("received", lambda w, _: received(w))
    _check(weights)
    return weights.sum(-2)


def sink_mass(weights: Tensor | Recorded, sinks: int | Sequence[int] = 1) -> Tensor:
    """How much of each query's attention goes to the first `sinks` keys, or to those listed: `(…, Nq)`."""
    if not isinstance(weights, Tensor):
        # Statistics know the mass of the first keys that they were told of; the record checks the number.
        field = f"sink_mass:{sinks}" if isinstance(sinks, int) else None
        return weights.measured(field, lambda w, _: sink_mass(w, sinks))
    _check(weights)
    if isinstance(sinks, int):
        return weights[..., :sinks].sum(-1)
    return weights[..., torch.as_tensor(sinks, device=weights.device)].sum(-1)


def mean_distance(
    weights: Tensor | Recorded, *, grid: tuple[int, ...] | None = None, prefix: int = 0, offset: int = 0
) -> Tensor:
    """Σ_j w_ij |place(i) − place(j)| of each query, `(…, Nq)`: in tokens, or in cells of a `grid` (row-major).

    `prefix` tokens before the grid, and any after it, have no place on it: the mean is over the keys that have one, and
    0 for a query that has none. The first query stands at position `offset`. A record knows all three.
    """
    if not isinstance(weights, Tensor):
        return weights.measured("distance", lambda w, where: mean_distance(w, **where))
    _check(weights)
    if grid is not None and prefix + math.prod(grid) > weights.shape[-1]:
        raise ValueError(f"grid {grid} after {prefix} tokens does not fit {weights.shape[-1]} keys")
    (q, q_placed), (k, k_placed) = (
        places(n, grid, prefix, at, weights.device) for n, at in zip(weights.shape[-2:], (offset, 0), strict=True)
    )
    both = q_placed[:, None] & k_placed
    apart = (q[:, None] - k).to(weights.dtype).square().sum(-1).sqrt() * both
    share = (weights * k_placed).sum(-1)
    total = (weights * apart).sum(-1)
    return total if bool(both.all()) else total / share.masked_fill(share == 0, 1.0)


def head_similarity(weights: Tensor | Recorded) -> Tensor:
    """How alike heads look: mean over queries of Σ_j min(w_ij, w'_ij), `(…, H, Nq, Nk)` to `(…, H, H)`.

    The share of attention that two heads put in the same place, 1 minus the total variation distance: 1 for a head
    and itself, 0 for heads that have no key in common.
    """
    if not isinstance(weights, Tensor):
        return weights.measured(None, lambda w, _: head_similarity(w))
    _check(weights)
    if weights.dim() < 3:
        raise ValueError(f"weights must be (…, H, Nq, Nk), got {tuple(weights.shape)}")
    # A head at a time: all pairs at once would hold H² matrices.
    rows = [torch.minimum(one.unsqueeze(-3), weights).sum(-1).mean(-1) for one in weights.unbind(-3)]
    return torch.stack(rows, -2)


def places(
    count: int, grid: tuple[int, ...] | None, prefix: int, offset: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Coordinates `(N, axes)` of tokens, the first of them at `offset`, and whether each has any."""
    at = torch.arange(offset, offset + count, device=device)
    if grid is None:
        return at[:, None], torch.ones(count, dtype=torch.bool, device=device)
    size = math.prod(grid)
    at = at - prefix
    return torch.stack(torch.unravel_index(at.clamp(0, size - 1), grid), -1), (at >= 0) & (at < size)


def _check(weights: Tensor) -> None:
    if weights.dim() < 2 or not weights.is_floating_point():
        raise ValueError(f"weights must be floating point (…, Nq, Nk), got {weights.dtype} {tuple(weights.shape)}")
