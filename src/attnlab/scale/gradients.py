"""The gradients of one block of keys, from the output and the lse over all of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from attnlab.attend import attend
from attnlab.backends.tiles.kernel import Call
from attnlab.backends.tiles.plan import one_tile, tiling
from attnlab.patterns import Causal, Full, Pattern
from attnlab.problem import Bias, Lookup


class Rows(NamedTuple):
    """Queries of a block, their output and lse over all keys, and the gradients of these."""

    q: Tensor
    out: Tensor
    lse: Tensor
    grad: Tensor
    grad_lse: Tensor | None


Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


def block_gradients(
    rows: Rows, k: Tensor, v: Tensor, pattern: Pattern | None, bias: Bias | None, scale: float, table: bool
) -> Gradients:
    """Gradients of q, k, v through one block of keys, and with `table` that of the bias's table or tensor.

    P = e^(S − lse)    dV = Pᵀ dO    dS = P ⊙ (dO Vᵀ − Σ dO ⊙ O + d lse)    dQ = dS K,  dK = dSᵀ Q
    """
    varied = pattern is not None and (pattern.per_batch or pattern.per_head)
    if rows.q.device.type == "cpu" and not varied and not table:
        return (*_fused(rows, k, v, pattern, bias, scale), None)
    return _again(rows, k, v, pattern, bias, scale, table)


def _again(
    rows: Rows, k: Tensor, v: Tensor, pattern: Pattern | None, bias: Bias | None, scale: float, table: bool
) -> Gradients:
    """The block once more by `attend`, as the part of a merge that it was: its share is e^(its lse − lse)."""
    _, out, lse, grad, grad_lse = rows
    dead = lse == -math.inf
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (rows.q, k, v)]
        q, k, v = inputs
        if table and isinstance(bias, Lookup):
            inputs.append(bias.table.detach().requires_grad_())
            bias = replace(bias, table=inputs[3])
        elif table and isinstance(bias, Tensor):
            bias = bias.detach().requires_grad_()
            inputs.append(bias)
        part, part_lse = attend(q, k, v, pattern=pattern, bias=bias, scale=scale, return_lse=True)
        share = (part_lse.detach() - lse.masked_fill(dead, 0.0)).exp().masked_fill(dead, 0.0)
        wide = grad.to(lse.dtype)
        toward = (wide * (part.detach() - out).to(lse.dtype)).sum(-1)
        toward = toward if grad_lse is None else toward + grad_lse
        found = torch.autograd.grad(
            [part, part_lse], inputs, [(wide * share[..., None]).to(part.dtype), (toward * share).to(part_lse.dtype)]
        )
    return found[0], found[1], found[2], found[3] if table else None


def _fused(
    rows: Rows, k: Tensor, v: Tensor, pattern: Pattern | None, bias: Bias | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The CPU kernel's own backward, tile by tile, which takes the output and lse over all keys as they are."""
    q, out, lse, grad, grad_lse = rows
    groups, kv_heads = q.shape[1] // k.shape[1], k.shape[1]
    if bias is None and (pattern is None or isinstance(pattern, Causal)):
        plan = one_tile(q.shape[2], k.shape[2], pattern is not None, q.device)
        if pattern is not None and groups > 1:  # rows of one tile must be in the order of their queries
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    else:
        plan = tiling(pattern or Full(), q.shape[2], k.shape[2], q.device)
    call = Call(q, k, v, plan, scale, bias)
    call.look_up()
    dq, dk, dv = call.backward(
        call.arrange(grad), None if grad_lse is None else call.arrange(grad_lse.unsqueeze(-1).to(lse.dtype), 1),
        call.arrange(q), call.gatherable(k), call.gatherable(v), call.arrange(out), call.arrange(lse.unsqueeze(-1), 1),
    )  # fmt: skip
    if dk.shape[1] > kv_heads:
        dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    return dq, dk, dv
