"""What an attention matrix looks like, in five numbers (arXiv 2510.11602): pure functions of the weights.

All take weights `(..., N, N)`, heads among the leading axes, causal ones with zeros above the diagonal.
"""

from __future__ import annotations

from torch import Tensor


def entropy(weights: Tensor) -> Tensor:
    """−Σ a log a over the whole matrix, `(...)`, in nats: how widely the queries look, summed over them."""
    _check(weights)
    return -(weights * weights.clamp_min(1e-45).log()).sum((-2, -1))


def concentration(weights: Tensor) -> Tensor:
    """The Frobenius norm ‖A‖, `(...)`: √N where each query looks at one key, small where all look everywhere."""
    _check(weights)
    return weights.square().sum((-2, -1)).sqrt()


def head_diversity(weights: Tensor) -> Tensor:
    """The mean over the lower triangle of the standard deviation across heads, for `(..., H, N, N)`: `(...)`."""
    _check(weights)
    if weights.dim() < 3 or weights.shape[-3] < 2:
        raise ValueError(f"weights must be (..., H, N, N) of two heads or more, got {tuple(weights.shape)}")
    n = weights.shape[-1]
    return weights.std(-3).tril().sum((-2, -1)) * 2 / (n * (n + 1))


def sink(weights: Tensor) -> Tensor:
    """The mean over queries of the weight on the first key, `(...)`."""
    _check(weights)
    return weights[..., 0].mean(-1)


def local_focus(weights: Tensor, distance: int) -> Tensor:
    """The mean weight on the key `distance` places back, over the queries that have one, `(...)`."""
    _check(weights)
    if not 0 <= distance < weights.shape[-1]:
        raise ValueError(f"distance must lie in 0 to N − 1 = {weights.shape[-1] - 1}, got {distance}")
    return weights.diagonal(-distance, -2, -1).mean(-1)


def _check(weights: Tensor) -> None:
    if weights.dim() < 2 or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"weights must be square matrices (..., N, N), got {tuple(weights.shape)}")
