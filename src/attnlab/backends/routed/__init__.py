"""Attention over blocks chosen from the content, straight from their lists. May import routing, problem and cost."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnlab.backends.routed.clusters import cluster_plan
from attnlab.backends.routed.kernel import STEP_BYTES, routed_attention
from attnlab.backends.routed.plan import Group, Plan, block_plan, parts
from attnlab.cost import Cost, machine
from attnlab.patterns import Pattern
from attnlab.problem import Problem
from attnlab.routing import Clustered, Routed
from attnlab.weightings import Elementwise, Softmax

__all__ = ["Group", "Plan", "RoutedBlocks", "routed_attention", "tile_plan"]


def tile_plan(chosen: Routed | Clustered, rest: tuple[Pattern, ...], batch: int, heads: int, kv_heads: int) -> Plan:
    """The tiles of a choice, narrowed by the static patterns `rest` (what `parts` finds in a pattern)."""
    if isinstance(chosen, Clustered):
        return cluster_plan(chosen, rest, batch, heads, kv_heads)
    return block_plan(chosen, rest, batch, heads, kv_heads)


class RoutedBlocks:
    """A choice of blocks or clusters (`attnlab.routing`), also narrowed by patterns, on the CPU, forward and backward.

    Only what is chosen is computed: whole blocks of queries against what they chose; where queries choose alone, whole
    blocks of keys against those who chose them; and each cluster by itself.
    """

    name = "routed"

    def unsupported(self, problem: Problem) -> str:
        if parts(problem.pattern) is None:
            return "the pattern is not a choice of blocks or clusters"
        if problem.traced:
            return "a graph tracer cannot follow which blocks are chosen"
        if problem.device.type != "cpu":
            return "made for the CPU"
        if not isinstance(problem.weighting, (Softmax, Elementwise)):
            return f"weighting {problem.weighting}"
        if problem.bias is not None:
            return "bias"
        return ""

    def cost(self, problem: Problem) -> Cost:
        p = problem
        found = parts(p.pattern)
        if found is None:
            raise ValueError(f"pattern must be a choice of blocks or clusters, got {p.pattern}")
        chosen, _ = found
        if isinstance(chosen, Routed):  # short blocks counted as whole ones
            scores = p.pairs * int(chosen.table.count_nonzero()) / chosen.table.numel()
        else:
            scores = p.pairs * chosen.density(p.nq, p.nk)
        passes = 4 if p.needs_grad else 1
        width, tile = p.dim + p.value_dim, max(chosen.queries.size if isinstance(chosen, Routed) else 1, 64)
        moved = p.dtype.itemsize * scores / tile * width * passes
        steps = 1 + 4.0 * scores / STEP_BYTES
        return machine(p.device).cost(
            "fused",
            scores,
            width,
            train=p.needs_grad,
            dtype=p.dtype,
            moved=moved,
            memory=4.0 * STEP_BYTES + p.dtype.itemsize * p.batch * p.heads * (p.nq + p.nk) * width,
            calls=10.0 * passes * steps,
        )

    def run(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        p = problem
        found = parts(p.pattern)
        if found is None:
            raise ValueError(f"pattern must be a choice of blocks or clusters, got {p.pattern}")
        tiles = tile_plan(*found, p.batch, p.heads, p.kv_heads)
        off = p.weighting.off if isinstance(p.weighting, Softmax) else 0.0
        out, lse = routed_attention(q, k, v, tiles, p.scale, p.weighting, p.dropout)
        if not off or lse is None:
            return out, lse
        # What is added to the denominator is one more key with a value of zero.
        extra = torch.full_like(lse, math.log(off))
        return out * torch.sigmoid(lse - extra).unsqueeze(-1).to(out.dtype), torch.logaddexp(lse, extra)
