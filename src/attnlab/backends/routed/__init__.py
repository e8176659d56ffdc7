"""Attention over blocks chosen from the content, straight from their lists. May import routing, problem and cost."""

from __future__ import annotations

from torch import Tensor

from attnlab.backends.routed.kernel import STEP_BYTES, routed_attention
from attnlab.backends.routed.plan import Group, Plan, parts, plan
from attnlab.cost import Cost, machine
from attnlab.problem import Problem

__all__ = ["Group", "Plan", "RoutedBlocks", "plan", "routed_attention"]


class RoutedBlocks:
    """A choice of blocks (`attnlab.routing`), alone or narrowed by patterns, on the CPU, forward and backward.

    Only chosen blocks are computed: whole blocks of queries against what they chose, or, where queries choose alone,
    whole blocks of keys against those who chose them.
    """

    name = "routed"

    def unsupported(self, problem: Problem) -> str:
        if parts(problem.pattern) is None:
            return "the pattern is not a choice of blocks"
        if problem.traced:
            return "a graph tracer cannot follow which blocks are chosen"
        if problem.device.type != "cpu":
            return "made for the CPU"
        if not problem.is_softmax:
            return f"weighting {problem.weighting} (only softmax)"
        if problem.bias is not None or problem.dropout:
            return "bias or dropout"
        return ""

    def cost(self, problem: Problem) -> Cost:
        p = problem
        found = parts(p.pattern)
        if found is None:
            raise ValueError(f"pattern must be a choice of blocks, got {p.pattern}")
        routed, _ = found
        scores = p.pairs * routed.density()
        passes = 4 if p.needs_grad else 1
        width, tile = p.dim + p.value_dim, max(routed.queries.size, 64)
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
            raise ValueError(f"pattern must be a choice of blocks, got {p.pattern}")
        return routed_attention(q, k, v, plan(*found, p.batch, p.heads, p.kv_heads), p.scale)
