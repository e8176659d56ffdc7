"""The oracle: the definition of attend, written out in float64 with every score in memory."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.backends.dense import log_sum
from attnlab.cost import Cost, machine
from attnlab.problem import Problem


class Reference:
    """Every problem, slowly and obviously: all Nq·Nk scores at once, in float64 whatever the inputs are."""

    name = "reference"

    def unsupported(self, problem: Problem) -> str:
        return ""

    def cost(self, problem: Problem) -> Cost:
        p = problem
        memory = 8.0 * p.pairs * (12 if p.needs_grad else 4)
        return machine(p.device).cost(
            "float64", p.pairs, p.dim + p.value_dim, train=p.needs_grad, memory=memory, calls=20
        )

    def run(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        q, k, v = q.double(), k.double(), v.double()
        k, v = (x.repeat_interleave(problem.groups, 1) for x in (k, v))
        scores = problem.scale * q @ k.transpose(-1, -2)
        bias = problem.materialised_bias(torch.float64)
        if bias is not None:
            scores = scores + bias
        seen = problem.pattern.allows(*problem.indices()).expand(scores.shape)
        weights = problem.weighting.weights(scores, seen, problem.nk)
        if problem.dropout:
            weights = F.dropout(weights, problem.dropout)
        out = (weights @ v).to(problem.dtype)
        if not problem.return_lse:
            return out, None
        lse = log_sum(scores.masked_fill(~seen, -math.inf), problem.weighting)
        return out, lse if problem.dtype is torch.float64 else lse.float()
