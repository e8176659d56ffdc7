"""Torch's own scaled_dot_product_attention, with the pattern as a mask."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.cost import Cost, machine
from attnlab.patterns import Pattern
from attnlab.problem import Problem
from attnlab.weightings import Elementwise, Weighting

# Masks up to this many pairs (16 MiB) are kept: sixteen of them at most.
_KEPT = 2**24


def _matrix(p: Problem) -> tuple[Tensor, bool]:
    """The pattern's matrix, and whether some query may see nothing."""
    batch, heads = p.batch if p.pattern.per_batch else 1, p.heads if p.pattern.per_head else 1
    if p.traced:
        # Asking for the values would break the graph.
        return p.pattern.matrix(p.nq, p.nk, batch=batch, heads=heads, device=p.device), True
    make = _make if p.routed or batch * heads * p.nq * p.nk > _KEPT else _kept
    return make(p.pattern, p.nq, p.nk, batch, heads, p.device)


def _make(pattern: Pattern, nq: int, nk: int, batch: int, heads: int, device: torch.device) -> tuple[Tensor, bool]:
    seen = pattern.matrix(nq, nk, batch=batch, heads=heads, device=device)
    return seen, not bool(seen.any(-1).all())


_kept = lru_cache(maxsize=16)(_make)


class Dense:
    """Every pair: torch's fused kernel where it takes the problem, all scores written out in memory where not."""

    name = "dense"

    def unsupported(self, problem: Problem) -> str:
        return ""

    def cost(self, problem: Problem) -> Cost:
        p = problem
        fused = _fused(p)
        skips = p.is_causal and p.bias is None and fused and p.nq > 1024
        copies, size = (0 if fused else 4 if p.needs_grad else 3), p.dtype.itemsize
        per_head = p.pattern.per_batch or p.pattern.per_head
        mask = 0 if p.is_full or (p.is_causal and p.bias is None) else (p.pairs if per_head else p.nq * p.nk)
        kept = mask <= _KEPT and not p.routed
        # Making a mask takes a dozen passes of integers, a bias by index a few more for every head.
        made = (0.0 if kept else 32.0 * mask) + (32.0 * p.heads * p.nq * p.nk if callable(p.bias) else 0.0)
        read = size * (mask / 2 + p.pairs / 8) if mask or p.bias is not None else 0.0
        return machine(p.device).cost(
            "fused" if fused else "by_hand",
            p.pairs * (0.5 if skips else 1.0),
            p.dim + p.value_dim,
            train=p.needs_grad,
            dtype=p.dtype,
            moved=made + read * (2 if p.needs_grad else 1),
            memory=(1.0 + size) * mask + size * copies * p.pairs,
            calls=1 if fused else 5,
        )

    def run(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        p = problem
        if p.return_lse or not p.is_softmax:
            return self._by_hand(p, q, k, v)
        mask = rows = None
        if not (p.is_full or (p.is_causal and p.bias is None)):
            mask, dead = _matrix(p)
            if dead and p.device.type != "cpu":
                # Some GPU kernels make NaN of a row without keys: let it see everything, then zero it, and so its
                # gradient. The CPU's kernels give zeros.
                rows = mask.any(-1, keepdim=True)
                mask = mask | ~rows
        bias = p.materialised_bias()
        if bias is not None and _by_products(p, bias):
            return ((p.scale * q) @ k.mT + bias).softmax(-1) @ v, None
        if bias is not None:
            mask = bias if mask is None else torch.where(mask, bias, -math.inf)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=p.dropout, scale=p.scale, enable_gqa=p.groups > 1,
            is_causal=p.is_causal and mask is None,
        )  # fmt: skip
        return (out if rows is None else out.masked_fill(~rows, 0.0)), None

    def _by_hand(self, p: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """What torch's kernels do not give: other weightings, and a log-sum-exp that can be differentiated."""
        if p.groups > 1:
            k, v = (x.repeat_interleave(p.groups, 1) for x in (k, v))
        wide = torch.promote_types(p.dtype, torch.float32)
        scores = ((p.scale * q) @ k.transpose(-1, -2)).to(wide)
        bias = p.materialised_bias(wide)
        if bias is not None:
            scores = scores + bias
        seen = torch.ones((), dtype=torch.bool, device=p.device) if p.is_full else _matrix(p)[0]
        if p.is_full and isinstance(p.weighting, Elementwise):
            weights = p.weighting.apply(scores, p.nk)  # no pass over all scores that hides nothing
        else:
            weights = p.weighting.weights(scores, seen, p.nk)
        if p.dropout:
            weights = F.dropout(weights, p.dropout)
        out = weights.to(p.dtype) @ v
        return out, (log_sum(scores.masked_fill(~seen, -math.inf), p.weighting) if p.return_lse else None)


def log_sum(scores: Tensor, weighting: Weighting) -> Tensor:
    """log(Σ exp(scores) + off) over the last axis; −inf, and no NaN in the gradient, where every score is −inf."""
    dead = (scores == -math.inf).all(-1)
    lse = torch.logsumexp(scores.masked_fill(dead[..., None], 0.0), -1).masked_fill(dead, -math.inf)
    off = getattr(weighting, "off", 0.0)
    return torch.logaddexp(lse, torch.full_like(lse, math.log(off))) if off else lse


def _fused(p: Problem) -> bool:
    """Whether one of torch's kernels runs the problem without writing out the scores."""
    if p.return_lse or not p.is_softmax or p.trained_bias:
        return False
    return p.device.type != "cpu" or (p.dim == p.value_dim and not p.dropout)


def _by_products(p: Problem, bias: Tensor) -> bool:
    """Whether training a bias takes fewer passes over the scores than torch's own, which looks for rows without keys.

    The CPU's fused kernel has no gradient for a bias. Where every score is finite, no row is without keys.
    """
    plain = p.trained_bias and p.is_full and p.groups == 1 and not (p.dropout or p.traced)
    full = p.dtype in (torch.float32, torch.float64) and p.device.type == "cpu"
    return plain and full and bool(bias.detach().isfinite().all())
