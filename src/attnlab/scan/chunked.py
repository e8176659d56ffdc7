"""The scan by chunks: matrix products inside a chunk and one state update between chunks; forward and backward.

With the decays of a chunk folded into its rows (`Decays`), the chunk that starts from state S does

    A = strictly lower of k·k, decayed          T = (I + β A)⁻¹ β          P = lower of q·k, decayed
    u = T v − T (k ⊙ prefix) S                                            (without beta: u = v)
    o = (q ⊙ prefix) S + P u                S ← total ⊙ S + (k ⊙ suffix)ᵀ u

Only u and S are in sequence. The backward is given u, the state at each chunk's start and the matrices between tokens;
it recomputes the rest, a few chunks at a time, so that the working set stays in cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab.autocast import autocast_off
from attnlab.scan.decays import Decays, decayed_scores, decayed_scores_backward, shared_decay_backward, unit_inverse
from attnlab.scan.recurrent import Inputs

# Tokens (over all rows) that are worked on together: 64 channels of them in float32 fill 512 KiB, and about ten such
# arrays are alive at a time.
TOKENS_AT_A_TIME = 2048


class _Parts:
    """What a few chunks need beside the state that they start from: q, k (R, C, Dk), v (R, C, Dv), beta (R, C, 1).

    `rows` are what reads the state: q, and with beta also k. `readers` are the rows with the chunk's decays up to them,
    `squares` (R, C, C) their decayed products with the earlier keys.
    """

    def __init__(self, inputs: Inputs, kept: Sequence[Tensor] = ()) -> None:
        q, k, v, decay, beta = inputs
        self.k, self.v, self.beta = k, v, beta
        self.rows = [q] if beta is None else [q, k]
        self.decays = None if decay is None else Decays(decay.exp())
        self.weights: Tensor | None = None
        self.readers, self.write = self.rows, k
        if self.decays is None:
            self.weights = k.new_ones(k.shape[1], k.shape[1]).tril(-1)
        else:
            self.readers, self.write = [row * self.decays.prefix for row in self.rows], k * self.decays.suffix
            if self.decays.prefix.shape[-1] == 1:
                one = torch.ones_like(self.decays.prefix)
                self.weights = decayed_scores([one], one, self.decays)[0]
        if kept:
            self.squares = list(kept[: len(self.rows)])
        elif self.weights is not None:
            self.squares = [(row @ k.mT) * self.weights for row in self.rows]
        elif self.decays is not None:
            self.squares = decayed_scores(self.rows, k, self.decays)
        self.scores = self.squares[0].clone()
        self.scores.diagonal(0, 1, 2).copy_((q * k).sum(-1))
        self.fresh = v
        if kept and beta is not None:
            self.solve, self.known = kept[len(self.rows) :]
        elif beta is not None:
            self.solve = unit_inverse(beta * self.squares[1])
            scaled = self.solve * beta.mT
            self.fresh, self.known = scaled @ v, scaled @ self.readers[1]

    def kept(self) -> list[Tensor]:
        """What is dear to compute again and small: given back as `kept`, `fresh` alone is not there."""
        return self.squares if self.beta is None else [*self.squares, self.solve, self.known]

    def total(self, count: int) -> list[Tensor] | None:
        """The decay over each of `count` whole chunks, (M, 1 or Dk, 1) each."""
        if self.decays is None:
            return None
        return list(self.decays.prefix[:, -1].unsqueeze(-1).chunk(count))


def _take(x: Tensor, start: int, stop: int) -> Tensor:
    """Chunks start..stop of x (M, n, C, D), chunk by chunk: ((stop − start)·M, C, D), contiguous."""
    return x[:, start:stop].transpose(0, 1).flatten(0, 1).contiguous()


def _put(into: Tensor | None, start: int, stop: int, value: Tensor | None) -> None:
    if into is not None and value is not None:
        into[:, start:stop] = value.view(stop - start, -1, *value.shape[1:]).transpose(0, 1)


class _Chunked(torch.autograd.Function):
    """q, k (M, n, C, Dk), v (M, n, C, Dv), decay (M, n, C, 1 or Dk), beta (M, n, C, 1), state (sequences, M, Dk, Dv).

    `first` holds the chunk with which each sequence starts; `keep` says whether a backward will follow.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor | None,
        state: Tensor,
        first: tuple[int, ...],
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        rows, count, size, _ = q.shape
        step = max(1, TOKENS_AT_A_TIME // (rows * size))
        starts = {chunk: sequence for sequence, chunk in enumerate(first)}
        out, kept, final = torch.empty_like(v), [], []
        now = state[0]
        for start in range(0, count, step):
            stop = min(start + step, count)
            part = _Parts(Inputs(q, k, v, decay, beta).each(partial(_take, start=start, stop=stop)))
            n = stop - start
            total, write, new = part.total(n), part.write.chunk(n), list(part.fresh.chunk(n))
            known = None if beta is None else part.known.chunk(n)
            states = []
            for c in range(n):
                if start + c in starts:
                    if start + c:
                        final.append(now)
                    now = state[starts[start + c]]
                states.append(now)
                if known is not None:
                    new[c] = torch.baddbmm(new[c], known[c], now, alpha=-1)
                now = torch.baddbmm(now if total is None else now * total[c], write[c].mT, new[c])
            fresh, state_at = torch.cat(new), torch.cat(states)
            _put(out, start, stop, torch.baddbmm(part.scores @ fresh, part.readers[0], state_at))
            if keep:
                kept += [fresh, state_at, *part.kept()]
        final.append(now)
        if keep:
            ctx.save_for_backward(q, k, v, decay, beta, *kept)
            ctx.first, ctx.step = first, step
        return out, torch.stack(final)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> Any:
        with autocast_off(d_out):
            return _backward(ctx, d_out, d_final)


def _backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> Any:
    """From the last chunks to the first: the forward's parts again, the states' gradients one by one, then the rest."""
    q, k, v, decay, beta, *kept = ctx.saved_tensors
    pieces = -(-q.shape[1] // ctx.step)
    each = len(kept) // pieces
    count, step = q.shape[1], ctx.step
    starts = {chunk: sequence for sequence, chunk in enumerate(ctx.first)}
    ends = {chunk - 1: sequence for sequence, chunk in enumerate((*ctx.first[1:], count))}
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    d_decay = None if decay is None else torch.empty_like(decay)
    d_beta = None if beta is None else torch.empty_like(beta)
    d_state: list[Tensor] = [d_final[0]] * len(ctx.first)
    d_now = d_final[-1]
    for piece in reversed(range(pieces)):
        start, stop = piece * step, min((piece + 1) * step, count)
        fresh, state_at, *dear = kept[piece * each : (piece + 1) * each]
        part = _Parts(Inputs(q, k, v, decay, beta).each(partial(_take, start=start, stop=stop)), dear)
        grad = _take(d_out, start, stop)
        n = stop - start
        total, write = part.total(n), part.write.chunk(n)
        known = None if beta is None else part.known.chunk(n)
        d_new, d_states = list((part.scores.mT @ grad).chunk(n)), list((part.readers[0].mT @ grad).chunk(n))
        d_next: list[Tensor] = []
        for c in reversed(range(n)):
            if start + c in ends:
                d_now = d_final[ends[start + c]]
            d_next.append(d_now)
            d_new[c] = torch.baddbmm(d_new[c], write[c], d_now)
            d_before = d_states[c] + (d_now if total is None else d_now * total[c])
            d_now = d_before if known is None else torch.baddbmm(d_before, known[c].mT, d_new[c], alpha=-1)
            if start + c in starts:
                d_state[starts[start + c]] = d_now
        grads = _gradients(part, grad, torch.cat(d_new), torch.cat(d_next[::-1]), fresh, state_at)
        for into, value in zip((dq, dk, dv, d_decay, d_beta), grads, strict=True):
            _put(into, start, stop, value)
    return dq, dk, dv, d_decay, d_beta, torch.stack(d_state), None, None


def _gradients(
    part: _Parts, d_out: Tensor, d_fresh: Tensor, d_next: Tensor, fresh: Tensor, state: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, decay, beta of a few chunks, given those of their outputs, of u and of later states."""
    decays, beta, k, rows = part.decays, part.beta, part.k, part.rows
    dv, d_beta, upstream = d_fresh, None, [d_out]
    if beta is not None:
        # u = β ⊙ written, where written = v − (what the state and the chunk's earlier tokens already say for this key).
        d_solved = part.solve.mT @ d_fresh
        written = part.v - torch.baddbmm(part.squares[1] @ fresh, part.readers[1], state)
        d_beta = (d_solved * written).sum(-1, keepdim=True)
        dv = beta * d_solved
        upstream = [d_out, -dv]
    d_squares = [d @ fresh.mT for d in upstream]
    d_rows = [d @ state.mT for d in upstream]  # of the readers, until the decays are multiplied in
    dk = fresh @ d_next.mT  # of what is written, likewise
    diagonal = d_squares[0].diagonal(0, 1, 2).unsqueeze(-1)
    d_decay: Any = None
    if decays is not None:
        d_prefix, d_suffix = d_rows[0] * part.readers[0], dk * part.write
        for d_row, reader in zip(d_rows[1:], part.readers[1:], strict=True):
            d_prefix.addcmul_(d_row, reader)
        d_prefix[:, -1] += (d_next * state).sum(-1) * decays.prefix[:, -1]
        for d_row in d_rows:
            d_row.mul_(decays.prefix)
        dk.mul_(decays.suffix)
    if part.weights is not None:
        for row, d_row, d_square in zip(rows, d_rows, d_squares, strict=True):
            weighted = d_square * part.weights
            d_row.baddbmm_(weighted, k)
            dk.baddbmm_(weighted.mT, row)
        if decays is not None:
            d_log = torch.stack([d * s for d, s in zip(d_squares, part.squares, strict=True)]).sum(0)
            d_decay = shared_decay_backward(d_log, d_prefix.sum(-1), d_suffix.sum(-1)).unsqueeze(-1)
    elif decays is not None:
        d_decay = decayed_scores_backward(d_squares, rows, k, decays, d_rows, dk, d_prefix, d_suffix)
    dq = d_rows[0].addcmul_(diagonal, k)
    dk.addcmul_(diagonal, rows[0])
    return dq, dk if beta is None else dk.add_(d_rows[1]), dv, d_decay, d_beta


def chunked(inputs: Inputs, state: Tensor, first: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The scan of `inputs`, each (M, n, C, channels): n chunks of C tokens, a power of two; see `_Chunked`."""
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, state))
    total = inputs.q.shape[0]
    rows = max(1, TOKENS_AT_A_TIME // inputs.q.shape[2])
    if total <= rows:
        return _Chunked.apply(*inputs, state, first, keep)
    split = [[None] * -(-total // rows) if x is None else x.split(rows) for x in inputs]
    parts = [_Chunked.apply(*piece, s, first, keep) for *piece, s in zip(*split, state.split(rows, dim=1), strict=True)]
    return torch.cat([out for out, _ in parts]), torch.cat([final for _, final in parts], dim=1)
