"""Attention of a single query, as decoding needs it: keys are read where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from attnlab.patterns import Pattern
from attnlab.problem import Bias
from attnlab.weightings import SOFTMAX, Elementwise, Weighting


def attend_one(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]],
    *,
    scale: float | None = None,
    weighting: Weighting = SOFTMAX,
    bias: Bias | None = None,
    at: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """One query attends to stretches of keys: nothing is copied, masked or planned.

    Args:
        parts: `(q (B, H, 1, D), k (B, Hkv, n, D), v (B, Hkv, n, Dv))` per stretch, views of a cache. The queries may
            differ, being the same one turned differently.
        scale: D^-½ if None.
        weighting: softmax, or one that weighs each pair on its own.
        bias: as `attend` takes it, for this query; `at (n of all stretches)` is where each key stands in it.

    Returns:
        `(B, H, 1, Dv)`.
    """
    q, k, v = parts[0]
    if has_torch_function((q, k, v)):
        return handle_torch_function(
            attend_one, (q, k, v), parts, scale=scale, weighting=weighting, bias=bias, at=at, dropout=dropout
        )
    if len(parts) == 1 and bias is None and weighting == SOFTMAX:
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    heads, groups = q.shape[1], (k.shape[1], -1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = [(q * scale).squeeze(2).unflatten(1, groups) @ k.mT for q, k, _ in parts]  # (B, Hkv, H/Hkv, n)
    joined = scores[0] if len(scores) == 1 else torch.cat(scores, -1)
    if bias is not None:
        joined = joined + _values(bias, q, heads, joined.shape[-1], at).unflatten(1, groups).to(q.dtype)
    if isinstance(weighting, Elementwise):
        weights = weighting.apply(joined, joined.shape[-1])
    elif weighting == SOFTMAX:
        weights = joined.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    else:
        weights = weighting.weights(joined, torch.ones_like(joined, dtype=torch.bool), joined.shape[-1])
    if dropout:
        weights = F.dropout(weights, dropout)
    mixed = [w @ v for w, (_, _, v) in zip(weights.split([k.shape[2] for _, k, _ in parts], -1), parts, strict=True)]
    out = mixed[0] if len(mixed) == 1 else torch.stack(mixed).sum(0)
    return out.flatten(1, 2).unsqueeze(2)


def visible(pattern: Pattern, keys: int, device: torch.device) -> Tensor:
    """Indices of the keys that a single query sees under `pattern`, the same for every head and sample."""
    zero = torch.zeros((), dtype=torch.long, device=device)
    return pattern.allows(zero, zero, zero, torch.arange(keys, device=device)).nonzero().squeeze(-1)


def _values(bias: Bias, q: Tensor, heads: int, keys: int, at: Tensor | None) -> Tensor:
    """The bias of each head and key, `(B, H, n)`."""
    at = torch.arange(keys, device=q.device) if at is None else at
    if isinstance(bias, Tensor):
        values = bias[..., at]
    else:
        zero = at.new_zeros(())
        values = bias(zero, torch.arange(heads, device=q.device).view(-1, 1, 1), zero, at)
    return torch.broadcast_to(values, (len(q), heads, 1, keys)).squeeze(2)
