"""The oracle: the definition of attend, written out in float64 with every score in memory."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.cost import Cost
from attnlab.problem import Problem


class Reference:
    """Every problem, slowly and obviously: all Nq·Nk scores at once, in float64 whatever the inputs are."""

    name = "reference"

    def unsupported(self, problem: Problem) -> str:
        return ""

    def cost(self, problem: Problem) -> Cost:
        pairs = problem.batch * problem.heads * problem.nq * problem.nk
        flops = 2.0 * pairs * (problem.dim + problem.value_dim) * (3.5 if problem.needs_grad else 1)
        # Float64 products, and about eight passes over the matrix of scores.
        return Cost(flops, 64.0 * pairs, flops / 2e10 + 64.0 * pairs / 5e9)

    def run(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        q, k, v = q.double(), k.double(), v.double()
        k, v = (x.repeat_interleave(problem.groups, 1) for x in (k, v))
        scores = problem.scale * q @ k.transpose(-1, -2)
        bias = problem.materialised_bias()
        if bias is not None:
            scores = scores + bias.double()
        seen = problem.pattern.allows(*problem.indices()).expand(scores.shape)
        weights = problem.weighting.weights(scores, seen, problem.nk)
        if problem.dropout:
            weights = F.dropout(weights, problem.dropout)
        out = (weights @ v).to(problem.dtype)
        if not problem.return_lse:
            return out, None
        # A row without keys is −inf, by a detour around logsumexp's NaN gradient there.
        dead = ~seen.any(-1)
        lse = torch.logsumexp(scores.masked_fill(~seen, -math.inf).masked_fill(dead[..., None], 0.0), -1)
        off = getattr(problem.weighting, "off", 0.0)
        if off:
            lse = torch.logaddexp(lse.masked_fill(dead, -math.inf), torch.full_like(lse, math.log(off)))
            return out, lse.to(_wide(problem.dtype))
        return out, lse.masked_fill(dead, -math.inf).to(_wide(problem.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
