"""The selective scan of Mamba: a state per channel whose steps, reads and writes the tokens choose.

    h_t = e^(Δ_t a) ⊙ h_{t−1} + Δ_t x_t b_tᵀ          y_t = h_t c_t + skip ⊙ x_t

x, Δ (B, N, C), a (C, S) ≤ 0, b and c (B, N, S), skip (C), h (B, C, S). Each of the C·S numbers of the state forgets at
its own pace e^(Δ_tc a_cs), so that no product of matrices holds a chunk: the work is N·C·S exponentials either way.
Where all channels of a head share one pace (Mamba-2) it is `attnlab.scan.scan` with scalar decays. arXiv 2312.00752.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab.autocast import autocast_off

# Numbers of all states of the tokens that are worked on together: three such float32 arrays fit a core's cache.
NUMBERS_AT_A_TIME = 2**17


def selective_scan(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    skip: Tensor | None = None,
    state: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Outputs (B, N, C) in x's dtype and the last state (B, C, S) in at least float32.

    Args:
        x, delta: (B, N, C); a step of 0 leaves the state as it was and ignores the token.
        a: (C, S), negative.
        b, c: (B, N, S).
        skip: (C), what of x goes straight to y.
        state: (B, C, S), zeros if None.
        backend: "recurrent" (the oracle: one token at a time in plain operations), "blocked" (bulk work for a few
            tokens at a time with one multiply-add per token between, and a backward that keeps only one state per
            block), or "auto": recurrent for one token, else blocked.

    Cost O(N·C·S), memory O(N·C) and one state per block of tokens.
    """
    _check(x, delta, a, b, c, skip, state)
    if backend not in ("auto", "recurrent", "blocked"):
        raise ValueError(f"backend must be auto, recurrent or blocked, got {backend!r}")
    wide = torch.promote_types(x.dtype, torch.float32)
    with autocast_off(x):
        values, steps, a, b, c = (t.to(wide) for t in (x, delta, a, b, c))
        if state is None:
            state = values.new_zeros(x.shape[0], *a.shape)
        state = state.to(wide)
        if backend == "recurrent" or (backend == "auto" and x.shape[1] == 1):
            y, state = recurrent(values, steps, a, b, c, state)
        else:
            keep = torch.is_grad_enabled() and any(t.requires_grad for t in (values, steps, a, b, c, state))
            y, last = _Blocked.apply(values * steps, steps, a.mT.contiguous(), b, c, state.mT.contiguous(), keep)
            state = last.mT
        y = y if skip is None else torch.addcmul(y, skip.to(wide), values)
    return y.to(x.dtype), state


def recurrent(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The formula one token at a time, without the skip."""
    outputs = []
    for x_t, d_t, b_t, c_t in zip(*(t.unbind(1) for t in (x, delta, b, c)), strict=True):
        state = (d_t.unsqueeze(-1) * a).exp() * state + (d_t * x_t).unsqueeze(-1) * b_t.unsqueeze(1)
        outputs.append((state @ c_t.unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, 1), state


def _block(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states (T, B, S, C) of T tokens from the `state` (B, S, C) before them."""
    decays = (delta.transpose(0, 1).unsqueeze(2) * a).exp_()
    states = u.transpose(0, 1).unsqueeze(2) * b.transpose(0, 1).unsqueeze(3)
    before = state
    for t, decay in enumerate(decays.unbind(0)):
        before = states[t].addcmul_(decay, before)  # an indexed view: export refuses to write into those of unbind
    return decays, states


class _Blocked(torch.autograd.Function):
    """u = Δx and delta (B, N, C), a (S, C), b and c (B, N, S), state (B, S, C): channels last, where they are many."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor]:
        size = max(1, NUMBERS_AT_A_TIME // state.numel())
        starts, outputs = [state], []
        for piece in zip(*(t.split(size, 1) for t in (u, delta, b, c)), strict=True):
            _, states = _block(piece[0], piece[1], a, piece[2], starts[-1])
            outputs.append((piece[3].transpose(0, 1).unsqueeze(2) @ states).squeeze(2).transpose(0, 1))
            starts.append(states[-1].clone())
        if keep:
            ctx.save_for_backward(u, delta, a, b, c, *starts[:-1])
            ctx.size = size
        return torch.cat(outputs, 1), starts[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, d_last: Tensor) -> Any:
        u, delta, a, b, c, *starts = ctx.saved_tensors
        pieces = zip(*(t.split(ctx.size, 1) for t in (u, delta, b, c, d_y)), strict=True)
        found, d_a, carry = [], torch.zeros_like(a), d_last
        for start, (u_, delta_, b_, c_, d_y_) in reversed(list(zip(starts, pieces, strict=True))):
            decays, states = _block(u_, delta_, a, b_, start)
            d_out = d_y_.transpose(0, 1).unsqueeze(2)
            # The gradient of each state: what its own output asks for, and what the next state passes back.
            d_states = c_.transpose(0, 1).unsqueeze(3) * d_out
            for now, decay in zip(reversed(d_states.unbind(0)), reversed(decays.unbind(0)), strict=True):
                now += carry
                carry = decay * now
            d_c = (states @ d_out.mT).squeeze(3)
            d_b = (d_states @ u_.transpose(0, 1).unsqueeze(3)).squeeze(3)
            d_u = (b_.transpose(0, 1).unsqueeze(2) @ d_states).squeeze(2)
            # Of the logarithm of the decay, Δ a: the decayed state before, times the gradient.
            decays[0] *= start
            decays[1:] *= states[:-1]
            d_log = decays.mul_(d_states)
            d_a += (d_log * delta_.transpose(0, 1).unsqueeze(2)).sum((0, 1))
            found.append([t.transpose(0, 1) for t in (d_u, (d_log * a).sum(2), d_b, d_c)])
        d_u, d_delta, d_b, d_c = (torch.cat(parts, 1) for parts in zip(*reversed(found), strict=True))
        return d_u, d_delta, d_a, d_b, d_c, carry, None


def _check(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None, state: Tensor | None
) -> None:
    given = {"x": x, "delta": delta, "a": a, "b": b, "c": c, "skip": skip, "state": state}
    for name, t in given.items():
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t is not None and not t.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {t.dtype}")
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x must have shape (batch, tokens, channels), not empty, got {tuple(x.shape)}")
    if a.ndim != 2 or a.shape[0] != x.shape[2]:
        raise ValueError(f"a must have shape ({x.shape[2]}, states), one row per channel, got {tuple(a.shape)}")
    batch, length, channels, states = *x.shape, a.shape[1]
    wanted = {
        "delta": (batch, length, channels), "b": (batch, length, states), "c": (batch, length, states),
        "skip": (channels,), "state": (batch, channels, states),
    }  # fmt: skip
    for name, shape in wanted.items():
        t = given[name]
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
