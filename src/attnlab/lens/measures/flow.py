"""Attention through all layers at once: rollout, and the regularised flow that tells where an object's word looked.

Sources: arXiv 2005.00928 (rollout); arXiv 2410.05963 (VL-SAM: heads by mean and max, the flow, its regularisation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Regularise = Literal["layers", "end"] | None


def rollout(layers: Sequence[Tensor] | Tensor, *, residual: float = 0.5) -> Tensor:
    """Π_l (residual · I + (1 − residual) · A_l), the later from the left: `(…, N, N)`, rows sum to one where A's do.

    layers: weights of each layer `(…, H, N, N)`, of which the mean over heads is taken.
    """
    if not 0 <= residual <= 1:
        raise ValueError(f"residual must be in [0, 1], got {residual}")
    total: Tensor | None = None
    for weights in layers:
        mean = _square(weights).mean(-3)
        unit = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        step = residual * unit + (1 - residual) * mean
        total = step if total is None else step @ total
    if total is None:
        raise ValueError("layers must not be empty")
    return total


def head_weights(weights: Tensor, rows: Tensor | None = None) -> Tensor:
    """mean_i max_j S_ij of each head, `(…, H)` of weights `(…, H, N, N)`: 1 where every query looks at one key.

    rows: the queries that count (N, bool), without padding.
    """
    most = weights.amax(-1)
    return (most if rows is None else most[..., rows]).mean(-1)


def mean_max(weights: Tensor, rows: Tensor | None = None) -> Tensor:
    """S' = mean over heads of head_weights · S: `(…, N, N)` of weights `(…, H, N, N)`; rows sum to at most one."""
    return (_square(weights) * head_weights(weights, rows)[..., None, None]).mean(-3)


def visibility(tokens: int, *, seen_by: Tensor | None = None) -> Tensor:
    """1 − (L_j − 1) / N of each key j, (N), L_j the number of queries that may look at it: under a causal mask from
    1 / N for the first token, which all see, to 1 for the last."""
    counts = torch.arange(tokens, 0, -1, dtype=torch.float64) if seen_by is None else seen_by.double()
    return 1 - (counts - 1) / tokens


def attention_flow(
    layers: Sequence[Tensor] | Tensor,
    rows: Tensor | Sequence[int] | None = None,
    *,
    regularise: Regularise = "layers",
    seen_by: Tensor | None = None,
) -> Tensor:
    """How much reaches a token from every other through all layers: `(R, N)` for the tokens `rows`, or (N, N) for all.

        F_1 = S'_1,     F_l = (I + S'_l)(I + F_(l−1))           then the rows of F_L

    layers: S'_l `(N, N)` from the first layer to the last (`mean_max`). regularise: "layers" multiplies the columns of
    each S'_l by `visibility`, "end" those of F_L, None leaves them: then the mask makes all flow end at the first
    tokens. `seen_by` (N) says how many queries may look at each key, if the mask is other than causal. A few rows cost
    R N² a layer, for no product of matrices is needed: with v_L = e (I + S'_L) and v_l = v_(l+1) (I + S'_l),
    e F_L = v_L + … + v_2 + v_2 S'_1.
    """
    if regularise not in ("layers", "end", None):
        raise ValueError(f"regularise must be 'layers', 'end' or None, got {regularise!r}")
    if not len(layers) or any(a.ndim != 2 or a.shape != (len(layers[0]),) * 2 for a in layers):
        raise ValueError(f"layers must be matrices (N, N) of one size, got {[tuple(a.shape) for a in layers]}")
    tokens, like = len(layers[0]), layers[0]
    factor = visibility(tokens, seen_by=seen_by).to(like)
    if rows is None:
        v = torch.eye(tokens, dtype=like.dtype, device=like.device)
    else:
        wanted = torch.as_tensor(rows, device=like.device)
        v = torch.zeros(len(wanted), tokens, dtype=like.dtype, device=like.device)
        v[torch.arange(len(wanted), device=like.device), wanted] = 1
    flow = torch.zeros_like(v)
    for depth in range(len(layers) - 1, -1, -1):
        step = v @ layers[depth]
        if regularise == "layers":
            step = step * factor
        v = v + step if depth else step
        flow = flow + v
    return flow * factor if regularise == "end" else flow


def object_map(flow: Tensor, columns: Tensor, grid: tuple[int, int]) -> Tensor:
    """Where a word looked, `grid` (h, w) in [0, 1]: the mean of its tokens' flow (R, N) at the image's columns."""
    if len(columns) != grid[0] * grid[1]:
        raise ValueError(f"grid {grid} does not hold {len(columns)} image tokens")
    values = flow[:, columns].mean(0).view(grid)
    values = values - values.min()
    return values / values.max() if values.max() > 0 else values


def _square(weights: Tensor) -> Tensor:
    if weights.ndim < 3 or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"weights must be (…, H, N, N), got {tuple(weights.shape)}")
    return weights
