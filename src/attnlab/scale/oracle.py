"""The distributed algorithms written out on lists of shards, slowly and obviously: what the fast ones are tested by."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnlab.patterns import Full, Pattern
from attnlab.scale.layout import Layout


def ring(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    layout: Layout,
    pattern: Pattern | None = None,
    scale: float | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Exact attention of every rank's queries while keys and values go round: outputs and lse of each rank.

    For t = 0 … R − 1, rank r meets the block of rank (r + t) mod R and keeps a running maximum m, sum l and output o:

        m' = max(m, max S)    l' = l e^(m − m') + Σ e^(S − m')    o' = o e^(m − m') + e^(S − m') V    out = o / l

    In float64; torch differentiates it. Source: arXiv 2310.01889, 2302.06218.
    """
    pattern, outs, lses = pattern or Full(), [], []
    for r in range(layout.ranks):
        queries = q[r].double()
        batch, heads, rows, dim = queries.shape
        m = queries.new_full((batch, heads, rows), -math.inf)
        total, out = torch.zeros_like(m), queries.new_zeros(batch, heads, rows, v[0].shape[-1])
        for t in range(layout.ranks):
            s = (r + t) % layout.ranks
            keys, values = (x[s].double().repeat_interleave(heads // x[s].shape[1], 1) for x in (k, v))
            if not (rows and keys.shape[2]):
                continue
            b, h = torch.arange(batch).view(-1, 1, 1, 1), torch.arange(heads).view(-1, 1, 1)
            seen = pattern.allows(b, h, layout.positions(r)[:, None], layout.positions(s))
            scores = (queries @ keys.mT) * (dim**-0.5 if scale is None else scale)
            scores = scores.masked_fill(~seen, -math.inf)
            high = torch.maximum(m, scores.amax(-1)).detach()
            # e^(−∞ − (−∞)) is nothing: a finite stand-in for the maximum of rows that have seen no key.
            at = high.masked_fill(high == -math.inf, 0.0)
            weights, kept = (scores - at[..., None]).exp(), (m - at).exp()
            total = total * kept + weights.sum(-1)
            out = out * kept[..., None] + weights @ values
            m = high
        empty = total == 0
        outs.append(out / total.masked_fill(empty, 1.0)[..., None])
        lses.append((m + total.masked_fill(empty, 1.0).log()).masked_fill(empty, -math.inf))
    return outs, lses


def lasp2(q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], *, causal: bool = True) -> list[Tensor]:
    """Linear attention of every rank's chunk from the gathered states of all: outputs.

        M_t = K_tᵀ V_t      causal: O_t = [(Q_t K_tᵀ) ⊙ tril] V_t + Q_t Σ_{s<t} M_s      else O_t = Q_t Σ_s M_s

    Source: arXiv 2502.07563, algorithms 1 and 2.
    """
    states = [a.mT @ b for a, b in zip(k, v, strict=True)]
    if not causal:
        whole = torch.stack(states).sum(0)
        return [x @ whole for x in q]
    outs, before = [], torch.zeros_like(states[0])
    for x, a, b, state in zip(q, k, v, states, strict=True):
        outs.append((x @ a.mT).tril() @ b + x @ before)
        before = before + state
    return outs


def lasp2_gradients(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], grad: Sequence[Tensor], *, causal: bool = True
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The gradients (dq, dk, dv) of each rank, by the paper's formulas (algorithms 3 and 4).

    dM_t = Q_tᵀ dO_t; without a mask all ranks' dM are summed, with one those of the later ranks (a suffix).
    """
    states = [a.mT @ b for a, b in zip(k, v, strict=True)]
    grads = [a.mT @ b for a, b in zip(q, grad, strict=True)]
    zero, found = torch.zeros_like(states[0]), []
    for t, (x, a, b, g) in enumerate(zip(q, k, v, grad, strict=True)):
        state = sum(states[:t], zero) if causal else sum(states, zero)
        later = sum(grads[t + 1 :], zero) if causal else sum(grads, zero)
        dq, dk, dv = g @ state.mT, b @ later.mT, a @ later
        if causal:
            inner, scores = (g @ b.mT).tril(), (x @ a.mT).tril()
            dq, dk, dv = dq + inner @ a, dk + inner.mT @ x, dv + scores.mT @ g
        found.append((dq, dk, dv))
    return found
