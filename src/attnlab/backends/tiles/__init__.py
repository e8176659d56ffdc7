"""Reorder, tile, gather, small dense attention: any pattern, fast. May import patterns, problem, weightings, cost."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnlab.backends.routed import RoutedBlocks
from attnlab.backends.tiles.kernel import tile_attention
from attnlab.backends.tiles.plain import plain_attention
from attnlab.backends.tiles.plan import TILE, one_tile, split, tiling
from attnlab.backends.tiles.tiling import STEP_BYTES, Group, Lists, Tiling
from attnlab.backends.tiles.traced import tellable, traced_attention
from attnlab.cost import Cost, machine
from attnlab.merging import merge
from attnlab.patterns import Pattern
from attnlab.problem import Lookup, Problem
from attnlab.weightings import Softmax

__all__ = ["Group", "Lists", "Tiles", "Tiling", "tile_attention", "tiling"]

# Pairs from which an operator of its own is worth it inside torch.compile.
_WORTH = 2**18
# Pairs up to which a choice from the content, which will not come again, is worth a plan.
_PLANNED_ONCE = 2**22


class Tiles:
    """Every pattern on the CPU, forward and backward, in memory that grows with the tokens and not with their pairs.

    Softmax goes through torch's fused kernel tile by tile, with a fixed bias or a looked-up one; other weightings,
    dropout and bias tensors that are trained go through plain tensor operations, tile by tile too.
    """

    name = "tiles"

    def unsupported(self, problem: Problem) -> str:
        if problem.traced:
            return _untraceable(problem)
        if problem.routed and (problem.nq * problem.nk > _PLANNED_ONCE or not RoutedBlocks().unsupported(problem)):
            return "a plan for one call alone would take longer than the call"
        if problem.device.type != "cpu" and problem.is_full:
            return "full attention off the CPU (dense is made for it)"
        return ""

    def cost(self, problem: Problem) -> Cost:
        p = problem
        plans = _plans(p, p.pattern.at(0, 0)) if _fused(p) else [tiling(p.pattern.at(0, 0), p.nq, p.nk, p.device)]
        # What one tile computes, torch's kernel does alone, unless the lse is asked for.
        half = p.is_causal and p.return_lse and p.bias is None
        pairs = float(p.batch * p.heads * sum(plan.pairs for plan in plans)) * (0.5 if half else 1.0)
        fused, passes = _fused(p), 4 if p.needs_grad else 1
        # Keys and values are copied for each tile, and their gradients added up again.
        groups = [g for plan in plans for g in plan.groups]
        copied = sum(g.keys.tiles * g.keys.length for g in groups if g.keys.run is None)
        moved = 2.0 * p.dtype.itemsize * p.batch * p.kv_heads * copied * (p.dim + p.value_dim) * passes
        # A bias is picked pair by pair: measured as so many bytes of memory traffic.
        picked = 0 if p.bias is None or isinstance(p.bias, Lookup) else 20 if isinstance(p.bias, Tensor) else 6
        moved += picked * pairs * (2 if p.needs_grad else 1)
        apart = (p.batch if p.pattern.per_batch else 1) * (p.heads if p.pattern.per_head else 1)
        steps = apart * len(groups) + moved / STEP_BYTES
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
        if p.traced:
            return traced_attention(q, k, v, p.pattern, p.scale, p.bias if isinstance(p.bias, Lookup) else None)
        if not (p.pattern.per_batch or p.pattern.per_head):
            return _one(p, q, k, v)
        found = [_one(part, q[b, h], k[b, kv], v[b, kv]) for part, b, h, kv in p.parts()]
        heads = p.heads if p.pattern.per_head else 1
        rows = [[torch.cat(x, 1) for x in zip(*found[i : i + heads], strict=True)] for i in range(0, len(found), heads)]
        out, lse = (torch.cat(x) if len(x) > 1 else x[0] for x in zip(*rows, strict=True))
        return out, lse


def _untraceable(p: Problem) -> str:
    """Why a graph cannot have the problem as an operator; empty if it can."""
    if p.nq * p.nk < _WORTH:
        return "not worth it for few pairs inside torch.compile"
    if p.is_full or p.is_causal:
        return "dense is made for full and causal attention"
    if not (_fused(p) and p.is_softmax) or (p.bias is not None and not isinstance(p.bias, Lookup)):
        return "inside torch.compile only softmax on the CPU, with no bias but one that is looked up"
    if isinstance(p.bias, Lookup) and not (hasattr(p.bias.row, "__dataclass_fields__") and tellable(p.bias.row)):
        return "a graph cannot hold the rows of the bias: make them a dataclass of numbers"
    return "" if tellable(p.pattern) else "a graph cannot hold a pattern of tensors"


def _fused(p: Problem) -> bool:
    """Whether torch's fused CPU kernel takes the problem."""
    trained = p.trained_bias and not isinstance(p.bias, Lookup)
    return p.device.type == "cpu" and isinstance(p.weighting, Softmax) and not p.dropout and not trained


def _one(p: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    off = math.log(p.weighting.off) if isinstance(p.weighting, Softmax) and p.weighting.off else None
    if not _fused(p):
        out, lse = plain_attention(p, q, k, v, tiling(p.pattern, p.nq, p.nk, p.device))
        return out, lse if off is None else torch.logaddexp(lse, torch.full_like(lse, off))
    if p.is_causal and p.groups > 1:
        # Query heads that share a key head are rows of one tile, and those are not causal in their order.
        k, v = (x.repeat_interleave(p.groups, 1) for x in (k, v))
    plans = _plans(p, p.pattern)
    out, lse = _merged([tile_attention(q, k, v, plan, scale=p.scale, bias=p.bias) for plan in plans])
    if off is None:
        return out, lse
    # What is added to the denominator is one more key with a value of zero.
    return out * torch.sigmoid(lse - off).unsqueeze(-1).to(out.dtype), torch.logaddexp(lse, torch.full_like(lse, off))


def _plans(p: Problem, pattern: Pattern) -> list[Tiling]:
    """Tilings over disjoint keys that together are the pattern, for the fused kernel."""
    if p.bias is None and (p.is_full or p.is_causal):
        return [one_tile(p.nq, p.nk, p.is_causal, p.device)]
    plans = []
    for part in split(pattern, p.nq, p.nk):
        plan = tiling(part, p.nq, p.nk, p.device)
        # Small tiles see fewer keys in vain; where nothing is copied for them, only a backward minds their number.
        plans.append(tiling(part, p.nq, p.nk, p.device, TILE // 2) if plan.in_place and not p.needs_grad else plan)
    return plans


def _merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the keys of all parts, which are disjoint."""
    return parts[0] if len(parts) == 1 else merge(parts)
