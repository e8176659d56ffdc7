"""Torch's own scaled_dot_product_attention, with the pattern as a mask."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.cost import Cost
from attnlab.patterns import Pattern
from attnlab.problem import Problem


@lru_cache(maxsize=32)
def _matrix(pattern: Pattern, nq: int, nk: int, batch: int, heads: int, device: torch.device) -> tuple[Tensor, bool]:
    """The pattern's matrix and whether some query sees nothing, computed once for each problem shape."""
    seen = pattern.matrix(nq, nk, batch=batch, heads=heads, device=device)
    return seen, bool((~seen.any(-1)).any())


class Dense:
    """Softmax over every pair: torch's fused kernel where it takes the problem, all scores in memory where not."""

    name = "dense"

    def unsupported(self, problem: Problem) -> str:
        if problem.is_softmax and problem.return_lse and problem.dropout:
            return "dropout and lse together"
        return "" if problem.is_softmax else f"weighting {problem.weighting} (only softmax)"

    def cost(self, problem: Problem) -> Cost:
        pairs = problem.batch * problem.heads * problem.nq * problem.nk
        if problem.is_causal and not problem.return_lse and problem.bias is None:
            pairs //= 2
        flops = 2.0 * pairs * (problem.dim + problem.value_dim) * (3.5 if problem.needs_grad else 1)
        masked = not (problem.is_full or problem.is_causal)
        moved = 4.0 * pairs * (1.0 * masked + 4.0 * problem.return_lse)
        return Cost(flops, moved, flops / 6e10 + moved / 5e9 + 2e-5)

    def run(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        p = problem
        seen, dead = (None, False)
        if not (p.is_full or (p.is_causal and p.bias is None and not p.return_lse)):
            seen, dead = _matrix(p.pattern, p.nq, p.nk, p.batch, p.heads, p.device)
        if p.return_lse:
            return self._with_lse(p, q, k, v, seen)
        mask = seen
        rows = None
        if seen is not None and dead:
            # A row without keys is NaN in softmax: let it see everything, then zero it, and its gradient with it.
            rows = seen.any(-1, keepdim=True)
            mask = seen | ~rows
        bias = p.materialised_bias()
        if bias is not None:
            mask = bias if mask is None else torch.where(mask, bias, -math.inf)
            mask = mask.to(p.dtype)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=p.dropout, scale=p.scale, enable_gqa=p.groups > 1,
            is_causal=p.is_causal and mask is None,
        )  # fmt: skip
        return (out if rows is None else out.masked_fill(~rows, 0.0)), None

    def _with_lse(
        self, p: Problem, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The same by hand, since torch's kernels give no differentiable log-sum-exp."""
        if p.groups > 1:
            k, v = (x.repeat_interleave(p.groups, 1) for x in (k, v))
        wide = torch.float64 if p.dtype is torch.float64 else torch.float32
        scores = (p.scale * q @ k.transpose(-1, -2)).to(wide)
        bias = p.materialised_bias()
        if bias is not None:
            scores = scores + bias
        if seen is not None:
            scores = scores.masked_fill(~seen, -math.inf)
        dead = (scores == -math.inf).all(-1)
        lse = torch.logsumexp(scores.masked_fill(dead[..., None], 0.0), -1)
        weights = (scores - lse[..., None]).exp().to(p.dtype)
        return weights @ v, lse.masked_fill(dead, -math.inf)
