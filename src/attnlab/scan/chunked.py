"""The scan by chunks: matrix products inside a chunk and one state update between chunks; forward and backward.

With the decays of a chunk folded into its rows (`Decays`), the chunk that starts from state S does

    A = strictly lower of (β k)·k, decayed          T = (I + A)⁻¹          P = lower of q·k, decayed
    u = T (β v) − T (β k ⊙ prefix) S                                        (without beta: u = v)
    o = (q ⊙ prefix) S + P u                S ← total ⊙ S + (k ⊙ suffix)ᵀ u

Only u and S are in sequence. The backward keeps u and the state at each chunk's start and recomputes the rest, a few
chunks at a time, so that the working set stays in cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab.scan.decays import Decays, decayed_scores, decayed_scores_backward, scalar_scores_backward, unit_inverse
from attnlab.scan.recurrent import Inputs

# Tokens (over all rows) that are worked on together: 64 channels of them in float32 fill 512 KiB, and about ten such
# arrays are alive at a time.
TOKENS_AT_A_TIME = 2048


class _Parts:
    """What a few chunks need beside the state that they start from: q, k (R, C, Dk), v (R, C, Dv), beta (R, C, 1)."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None) -> None:
        self.q, self.k, self.v, self.beta = q, k, v, beta
        self.decays = None if decay is None else Decays(decay.exp())
        self.weights: Tensor | None = None
        self.read, self.write = q, k
        if self.decays is not None:
            if decay is not None and decay.shape[-1] == 1:
                one = torch.ones_like(decay)
                self.weights = decayed_scores(one, one, self.decays)
            self.read, self.write = q * self.decays.prefix, k * self.decays.suffix
        self.scores = self._scores(q)
        self.scores.diagonal(0, 1, 2).copy_((q * k).sum(-1))
        self.fresh = v
        if beta is not None:
            self.rows = beta * k
            self.repeats = self._scores(self.rows)
            self.solve = unit_inverse(self.repeats)
            self.reread = self.rows if self.decays is None else self.rows * self.decays.prefix
            self.known = self.solve @ self.reread
            self.fresh = self.solve @ (beta * v)

    def _scores(self, rows: Tensor) -> Tensor:
        if self.decays is None:
            return (rows @ self.k.mT).tril(-1)
        if self.weights is not None:
            return (rows @ self.k.mT) * self.weights
        return decayed_scores(rows, self.k, self.decays)

    def total(self, count: int) -> list[Tensor] | None:
        """The decay over each of `count` whole chunks, (M, 1 or Dk, 1) each."""
        if self.decays is None:
            return None
        return list(self.decays.prefix[:, -1].unsqueeze(-1).chunk(count))


def _chunks(x: Tensor | None, start: int, stop: int) -> Any:
    """Chunks start..stop of x (M, n, C, D), chunk by chunk: ((stop − start)·M, C, D), contiguous."""
    return None if x is None else x[:, start:stop].transpose(0, 1).flatten(0, 1).contiguous()


def _put(into: Tensor | None, start: int, stop: int, value: Tensor) -> None:
    if into is not None:
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
        out, kept_fresh, kept_states, final = torch.empty_like(v), [], [], []
        now = state[0]
        for start in range(0, count, step):
            stop = min(start + step, count)
            part = _Parts(*(_chunks(x, start, stop) for x in (q, k, v, decay, beta)))
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
            _put(out, start, stop, torch.baddbmm(part.scores @ fresh, part.read, state_at))
            if keep:
                kept_fresh.append(fresh)
                kept_states.append(state_at)
        final.append(now)
        if keep:
            ctx.save_for_backward(q, k, v, decay, beta, *kept_fresh, *kept_states)
            ctx.first, ctx.step = first, step
        return out, torch.stack(final)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> Any:
        q, k, v, decay, beta, *kept = ctx.saved_tensors
        kept_fresh, kept_states = kept[: len(kept) // 2], kept[len(kept) // 2 :]
        count, step = q.shape[1], ctx.step
        starts = {chunk: sequence for sequence, chunk in enumerate(ctx.first)}
        ends = {chunk - 1: sequence for sequence, chunk in enumerate((*ctx.first[1:], count))}
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        d_decay = None if decay is None else torch.empty_like(decay)
        d_beta = None if beta is None else torch.empty_like(beta)
        d_state: list[Tensor] = [d_final[0]] * len(ctx.first)
        d_now = d_final[-1]
        for piece in reversed(range(len(kept_fresh))):
            start, stop = piece * step, min((piece + 1) * step, count)
            part = _Parts(*(_chunks(x, start, stop) for x in (q, k, v, decay, beta)))
            fresh, state_at, grad = kept_fresh[piece], kept_states[piece], _chunks(d_out, start, stop)
            n = stop - start
            total, write = part.total(n), part.write.chunk(n)
            known = None if beta is None else part.known.chunk(n)
            d_new, d_states = list((part.scores.mT @ grad).chunk(n)), list((part.read.mT @ grad).chunk(n))
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
            grads = _backward(part, grad, torch.cat(d_new), torch.cat(d_next[::-1]), fresh, state_at)
            for into, value in zip((dq, dk, dv, d_decay, d_beta), grads, strict=True):
                _put(into, start, stop, value)
        return dq, dk, dv, d_decay, d_beta, torch.stack(d_state), None, None


def _backward(
    part: _Parts, d_out: Tensor, d_new: Tensor, d_next: Tensor, fresh: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Any, Any]:
    """Gradients of q, k, v, decay, beta of a few chunks, given those of their outputs, values and later states."""
    decays, beta, k = part.decays, part.beta, part.k
    d_scores = d_out @ fresh.mT
    d_read = d_out @ state.mT
    d_write = fresh @ d_next.mT
    d_diagonal = d_scores.diagonal(0, 1, 2).unsqueeze(-1)
    rows, d_squares, squares = [part.q], [d_scores], [part.scores]
    dv, d_reread = d_new, None
    d_beta: Any = None
    d_decay: Any = None
    dk: Any  # `sum` starts from the integer 0
    d_log: Any
    if beta is not None:
        d_solved = part.solve.mT @ d_new
        d_reread = d_solved @ state.mT
        rows, squares = [part.q, part.rows], [part.scores, part.repeats]
        d_squares = [d_scores, (d_solved @ fresh.mT).neg_()]
        dv = beta * d_solved
        d_beta = (d_solved * part.v).sum(-1, keepdim=True)
    if decays is None:
        d_squares = [d.tril(-1) for d in d_squares]
        d_rows = [d @ k for d in d_squares]
        dk = sum(d.mT @ r for d, r in zip(d_squares, rows, strict=True)) + d_write
        d_rows[0] += d_read
        if d_reread is not None:
            d_rows[1] -= d_reread
    else:
        d_prefix = d_read * part.read
        if d_reread is not None:
            d_prefix -= d_reread * part.reread
        d_suffix = d_write * part.write
        d_total = (d_next * state).sum(-1) * decays.prefix[:, -1]
        d_prefix[:, -1] += d_total
        if part.weights is not None:
            weighted = [d * part.weights for d in d_squares]
            d_rows = [d @ k for d in weighted]
            dk = sum(d.mT @ r for d, r in zip(weighted, rows, strict=True))
            d_log = sum(d * s for d, s in zip(d_squares, squares, strict=True))
            d_decay = scalar_scores_backward(d_log, d_prefix.sum(-1), d_suffix.sum(-1)).unsqueeze(-1)
        else:
            d_rows, dk, d_decay = decayed_scores_backward(d_squares, rows, k, decays, d_prefix, d_suffix)
        d_rows[0] += d_read * decays.prefix
        dk += d_write * decays.suffix
        if d_reread is not None:
            d_rows[1] -= d_reread * decays.prefix
    dq = d_rows[0].addcmul_(d_diagonal, k)
    dk.addcmul_(d_diagonal, part.q)
    if beta is not None:
        d_beta = d_beta + (d_rows[1] * k).sum(-1, keepdim=True)
        dk.addcmul_(beta, d_rows[1])
    return dq, dk, dv, d_decay, d_beta


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
