"""Reorder, tile, gather, small dense attention: any pattern, fast. May import patterns, problem, weightings, cost."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from attnlab.backends.routed import RoutedBlocks
from attnlab.backends.tiles.kernel import tile_attention
from attnlab.backends.tiles.plain import plain_attention
from attnlab.backends.tiles.plan import tiling
from attnlab.backends.tiles.tiling import STEP_BYTES, Group, Lists, Tiling
from attnlab.cost import Cost, machine
from attnlab.problem import Problem
from attnlab.weightings import Softmax

__all__ = ["Group", "Lists", "Tiles", "Tiling", "tile_attention", "tiling"]

# Pairs up to which a choice from the content, which will not come again, is worth a plan.
_PLANNED_ONCE = 2**22


class Tiles:
    """Every pattern on the CPU, forward and backward, in memory that grows with the tokens and not with their pairs.

    Softmax goes through torch's fused kernel tile by tile; other weightings, dropout and trained biases through plain
    tensor operations, tile by tile too.
    """

    name = "tiles"

    def unsupported(self, problem: Problem) -> str:
        if problem.traced:
            return "a graph tracer cannot follow the plan of the tiles"
        if problem.routed and (problem.nq * problem.nk > _PLANNED_ONCE or not RoutedBlocks().unsupported(problem)):
            return "a plan for one call alone would take longer than the call"
        if problem.device.type != "cpu" and problem.is_full:
            return "full attention off the CPU (dense is made for it)"
        return ""

    def cost(self, problem: Problem) -> Cost:
        p = problem
        plan = tiling(p.pattern.at(0, 0), p.nq, p.nk, p.device)
        pairs = float(p.batch * p.heads * plan.pairs)
        fused, passes = _fused(p), 4 if p.needs_grad else 1
        # Keys and values are copied for each tile, and their gradients added up again.
        copied = sum(g.keys.tiles * g.keys.length for g in plan.groups if g.keys.run is None)
        moved = 2.0 * p.dtype.itemsize * p.batch * p.kv_heads * copied * (p.dim + p.value_dim) * passes
        apart = (p.batch if p.pattern.per_batch else 1) * (p.heads if p.pattern.per_head else 1)
        steps = apart * len(plan.groups) + moved / STEP_BYTES
        tokens = p.batch * p.heads * (p.nq + p.nk) * (p.dim + p.value_dim)
        return machine(p.device).cost(
            "fused" if fused else "by_hand",
            pairs,
            p.dim + p.value_dim,
            train=p.needs_grad,
            dtype=p.dtype,
            moved=moved,
            memory=4.0 * STEP_BYTES + p.dtype.itemsize * tokens,
            calls=passes * (6 if fused else 20) * steps,
        )

    def run(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        p = problem
        if not (p.pattern.per_batch or p.pattern.per_head):
            return _one(p, q, k, v)
        rows = []
        for b in _slices(p.batch, p.pattern.per_batch):
            row = []
            for h in _slices(p.heads, p.pattern.per_head):
                kv = slice(h.start // p.groups, -(-h.stop // p.groups))
                row.append(_one(_part(p, b, h), q[b, h], k[b, kv], v[b, kv]))
            rows.append([torch.cat(x, 1) for x in zip(*row, strict=True)])
        out, lse = (torch.cat(x) for x in zip(*rows, strict=True))
        return out, lse


def _slices(count: int, apart: bool) -> list[slice]:
    return [slice(i, i + 1) for i in range(count)] if apart else [slice(0, count)]


def _part(p: Problem, b: slice, h: slice) -> Problem:
    """The problem of some batch entries and heads, in which the pattern looks the same for all."""
    heads = h.stop - h.start
    kv_heads = p.kv_heads if heads == p.heads else 1
    bias = p.bias
    if isinstance(bias, Tensor):
        bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
        bias = bias[b if len(bias) > 1 else slice(None), h if bias.shape[1] > 1 else slice(None)]
    elif bias is not None:
        whole = bias
        bias = lambda i, j, q, k: whole(i + b.start, j + h.start, q, k)  # noqa: E731
    return replace(
        p, batch=b.stop - b.start, heads=heads, kv_heads=kv_heads, pattern=p.pattern.at(b.start, h.start), bias=bias
    )


def _fused(p: Problem) -> bool:
    """Whether torch's fused CPU kernel takes the problem."""
    return p.device.type == "cpu" and isinstance(p.weighting, Softmax) and not p.dropout and not p.trained_bias


def _one(p: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    plan = tiling(p.pattern, p.nq, p.nk, p.device)
    off = math.log(p.weighting.off) if isinstance(p.weighting, Softmax) and p.weighting.off else None
    if not _fused(p):
        out, lse = plain_attention(p, q, k, v, plan)
        return out, lse if off is None else torch.logaddexp(lse, torch.full_like(lse, off))
    out, lse = tile_attention(q, k, v, plan, scale=p.scale, bias=p.bias)
    if off is None:
        return out, lse
    # What is added to the denominator is one more key with a value of zero.
    return out * torch.sigmoid(lse - off).unsqueeze(-1).to(out.dtype), torch.logaddexp(lse, torch.full_like(lse, off))
