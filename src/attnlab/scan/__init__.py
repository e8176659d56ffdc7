"""`scan`: attention with a running state (linear attention, retention, delta rules, KDA). Imports nothing above torch.

`recurrent` is the oracle and the decoder, `chunked` the parallel form for training, `fla` the GPU kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.overrides import handle_torch_function, has_torch_function

from attnlab.autocast import autocast_off
from attnlab.scan import fla
from attnlab.scan.chunked import chunked
from attnlab.scan.recurrent import Inputs, recurrent

__all__ = ["scan"]

BACKENDS = ("auto", "recurrent", "chunked", "fla")


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Read from a state that every token decays and writes to; return the outputs and the last state.

        S ← e^decay_t ⊙ S
        u_t = v_t, or with beta β_t (v_t − Sᵀ k_t)
        S ← S + k_t u_tᵀ,   o_t = scale · Sᵀ q_t

    | decay       | beta | is                                                    |
    |-------------|------|-------------------------------------------------------|
    | None        | None | linear attention (2006.16236)                         |
    | (B, H, N)   | None | retention (2307.08621), scalar-gated linear attention |
    | (B,H,N,Dk)  | None | gated linear attention (2312.06635)                   |
    | None        | given| delta rule (2406.06484)                               |
    | (B, H, N)   | given| gated delta rule (2412.06464)                         |
    | (B,H,N,Dk)  | given| Kimi Delta Attention (2510.26692)                     |

    Args:
        q, k: (B, Hk, N, Dk); Hk divides H, and the key head j serves the value heads j·r … j·r + r − 1.
        v: (B, H, N, Dv).
        decay: logarithm of the decay, ≤ 0; −inf empties the state exactly.
        beta: (B, H, N).
        scale: factor of q, 1 if None.
        state: (B, H, Dk, Dv), zeros if None.
        cu_seqlens: cumulated lengths [0, n₁, n₁+n₂, …, N] of sequences packed along N; then B is 1 and there is one
            state per sequence, (len(cu_seqlens) − 1, H, Dk, Dv).
        chunk: tokens per chunk of the chunked form, rounded up to a power of two; what is fast (32 with a decay per
            channel, else 64) if None.
        backend: "recurrent", "chunked", "fla" (CUDA, with flash-linear-attention), or "auto": recurrent for up to two
            tokens, else fla where it is there and nothing is being compiled, else chunked.

    Returns:
        Outputs (B, H, N, Dv) in v's dtype and the state in the dtype of the accumulation: float32, or float64 for
        float64 inputs. Cost O(N · (chunk·(Dk + Dv) + Dk·Dv)) per head.
    """
    if has_torch_function((q, k, v)):
        return handle_torch_function(
            scan, (q, k, v), q, k, v, decay=decay, beta=beta, scale=scale, state=state, cu_seqlens=cu_seqlens,
            chunk=chunk, backend=backend,
        )  # fmt: skip
    _check(q, k, v, decay, beta, state, chunk, backend)
    bounds = None if cu_seqlens is None else _bounds(cu_seqlens, q)
    batch, heads, length, width = *v.shape[:3], q.shape[-1]
    sequences = batch if bounds is None else len(bounds) - 1
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    if state is None:
        state = torch.zeros(sequences, heads, width, v.shape[-1], dtype=wide, device=v.device)
    elif state.shape != (sequences, heads, width, v.shape[-1]):
        wanted = (sequences, heads, width, v.shape[-1])
        raise ValueError(f"state must have shape {wanted}, one per sequence and head, got {tuple(state.shape)}")
    if backend == "auto":
        one_by_one = length <= 2 and bounds is None
        backend = "recurrent" if one_by_one else "fla" if fla.usable(q) else "chunked"
    if backend == "fla":
        return fla.run(q, k, v, decay, beta, 1.0 if scale is None else scale, state, bounds)

    repeats = heads // q.shape[1]
    q = q.to(wide) if scale is None else q.to(wide) * scale
    if repeats > 1:
        q, k = q.repeat_interleave(repeats, dim=1), k.repeat_interleave(repeats, dim=1)
    decay = decay.unsqueeze(-1) if decay is not None and decay.ndim == 3 else decay
    beta = None if beta is None else beta.unsqueeze(-1)
    inputs = Inputs(q, k, v, decay, beta).each(lambda x: x.to(wide))
    with autocast_off(q):
        if backend == "chunked":
            chunk = chunk or (64 if decay is None or decay.shape[-1] == 1 else 32)
            out, state = _chunked(inputs, state.to(wide), bounds, chunk)
        elif bounds is None:
            out, state = recurrent(inputs, state.to(wide))
        else:
            parts = [
                recurrent(inputs.each(lambda x, a=a, b=b: x[:, :, a:b]), state[i : i + 1].to(wide))  # type: ignore[misc]
                for i, (a, b) in enumerate(pairwise(bounds))
            ]
            out, state = torch.cat([o for o, _ in parts], dim=2), torch.cat([s for _, s in parts])
    return out.to(v.dtype), state


def _chunked(inputs: Inputs, state: Tensor, bounds: list[int] | None, chunk: int) -> tuple[Tensor, Tensor]:
    """Cut into chunks, padding the last one of each sequence with tokens that change nothing."""
    batch, heads, length, width = inputs.v.shape
    longest = length if bounds is None else max(b - a for a, b in pairwise(bounds))
    size = min(1 << (chunk - 1).bit_length(), 1 << (longest - 1).bit_length())
    if bounds is None:
        missing = -length % size
        if missing:
            inputs = inputs.each(lambda x: pad(x, (0, 0, 0, missing)))
        cut = inputs.each(lambda x: x.reshape(batch * heads, -1, size, x.shape[-1]))
        out, last = chunked(cut, state.flatten(0, 1).unsqueeze(0), (0,))
        out = out.reshape(batch, heads, -1, width)
        return (out[:, :, :length] if missing else out), last.view(state.shape)

    # Packed: each sequence starts a new chunk. `where` says where each token lies among the padded chunks.
    first, places, at = [], [], 0
    filled = [i for i, (a, b) in enumerate(pairwise(bounds)) if b > a]
    for i in filled:
        count = bounds[i + 1] - bounds[i]
        first.append(at)
        places.append(torch.arange(count, device=state.device) + at * size)
        at += -(-count // size)
    where = torch.cat(places)

    def spread(x: Tensor) -> Tensor:
        empty = x.new_zeros(heads, at * size, x.shape[-1])
        return empty.index_copy(1, where, x[0]).view(heads, at, size, -1)

    picked = torch.tensor(filled, device=state.device)
    out, last = chunked(inputs.each(spread), state[picked], tuple(first))
    out = out.reshape(heads, at * size, width).index_select(1, where).unsqueeze(0)
    return out, last if len(filled) == len(state) else state.index_copy(0, picked, last)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    chunk: int | None,
    backend: str,
) -> None:
    given = {"q": q, "k": k, "v": v, "decay": decay, "beta": beta, "state": state}
    for name, x in given.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q is on {q.device}; all inputs must be on one device")
        if name in "qkv" and x.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, tokens, channels), got {tuple(x.shape)}")
        if name in "qkv" and x.dtype != q.dtype:
            raise TypeError(f"q, k and v must share one dtype, got {q.dtype} for q and {x.dtype} for {name}")
    if q.shape != k.shape:
        raise ValueError(f"q and k must have the same shape, got {tuple(q.shape)} and {tuple(k.shape)}")
    if v.shape[0] != q.shape[0] or v.shape[2] != q.shape[2]:
        raise ValueError(f"v must share q's batch and tokens {q.shape[0], q.shape[2]}, got shape {tuple(v.shape)}")
    if v.shape[1] % q.shape[1]:
        raise ValueError(f"q's {q.shape[1]} heads must divide v's {v.shape[1]} heads")
    if q.shape[2] == 0:
        raise ValueError("q has no tokens; a scan needs at least one")
    if decay is not None and tuple(decay.shape) not in (tuple(v.shape[:3]), (*v.shape[:3], q.shape[3])):
        wanted = f"{tuple(v.shape[:3])} or {(*v.shape[:3], q.shape[3])}"
        raise ValueError(f"decay must have shape {wanted}, got {tuple(decay.shape)}")
    if beta is not None and beta.shape != v.shape[:3]:
        raise ValueError(f"beta must have shape {tuple(v.shape[:3])}, got {tuple(beta.shape)}")
    # Reading the values waits for a GPU and cannot be traced, so they are looked at only where that is cheap.
    looked_at = decay is not None and decay.device.type == "cpu" and not torch.compiler.is_compiling()
    if decay is not None and looked_at and float(decay.detach().amax()) > 0:
        raise ValueError(f"decay is the logarithm of the decay and must be ≤ 0, got {float(decay.max()):.3g}")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk must be a positive integer, got {chunk!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def _bounds(cu_seqlens: Tensor | Sequence[int], q: Tensor) -> list[int]:
    if isinstance(cu_seqlens, Tensor) and (cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point()):
        raise ValueError(f"cu_seqlens must be a 1-D integer tensor, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    bounds = [int(b) for b in (cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)]
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs all sequences into one row, but q has a batch of {q.shape[0]}")
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != q.shape[2] or any(b < a for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens {q.shape[2]}, got {bounds}")
    return bounds
