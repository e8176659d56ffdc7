"""LASP-2: scans over sequences that are spread over ranks, by one all-gather of states forward and one backward.

To a chunk of tokens the state before it is everything it needs to know of the past, and the chunk as a whole is an
affine map of that state, whatever the mechanism:

    S_after = A S_before + B        A: 1, a decay per head or per channel, or with a delta rule a matrix (Dk, Dk)

A rank computes the maps of its own pieces and its outputs as if the state had been empty, gathers everyone's maps, runs
through them up to its own pieces, and adds what its queries read from the state that they begin with. Source: arXiv
2502.07563; the affine map of a delta rule is derived here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab.scale.layout import Layout
from attnlab.scale.wire import Wire
from attnlab.scan import scan


class Piece(NamedTuple):
    """One piece of a rank: its outputs from an empty state, how it reads and how it changes the state before it."""

    out: Tensor  # (B, H, n, Dv)
    readers: Tensor  # (B, H, n, Dk): what is read of the state before the piece, out + readers @ state
    through: Tensor | None  # A: (B, H, Dk, 1) or (B, H, Dk, Dk); None is 1
    written: Tensor  # B: (B, H, Dk, Dv)


def piece_of(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, bounds: list[int], fresh: bool,
    backend: str,
) -> Piece:  # fmt: skip
    """The affine map of one piece, and what its queries see of it; with autograd.

    `bounds` cut the piece into packed sequences; `fresh` says that the first of them begins with the piece.

    With a delta rule one scan does it all: Dk more value channels are zero and their state is the unit matrix, so that
    their outputs are the readers and their last state is A.
    """
    batch, heads, width, values = len(v), v.shape[1], q.shape[3], v.shape[3]
    packed = len(bounds) > 2
    cu = bounds if packed else None
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    repeats = heads // q.shape[1]
    if beta is not None:
        start = torch.zeros(
            len(bounds) - 1 if packed else batch, heads, width, values + width, dtype=wide, device=v.device
        )
        if not fresh:
            start[: 1 if packed else None, :, :, values:] = torch.eye(width, dtype=wide, device=v.device)
        both, last = scan(
            q, k, torch.nn.functional.pad(v, (0, width)), decay=decay, beta=beta, state=start, cu_seqlens=cu,
            backend=backend,
        )  # fmt: skip
        last = last[-1:] if packed else last
        return Piece(both[..., :values], both[..., values:].to(wide), last[..., values:], last[..., :values])
    out, last = scan(q, k, v, decay=decay, cu_seqlens=cu, backend=backend)
    readers = q.to(wide).repeat_interleave(repeats, 1) if repeats > 1 else q.to(wide)
    through: Tensor | None = None
    if decay is not None:
        total = decay.to(wide).cumsum(2)
        total = total.unsqueeze(-1) if total.dim() == 3 else total
        readers = readers * total.exp()
        through = total[:, :, -1, :, None].expand(-1, -1, width, -1).exp()
    if packed or fresh:  # only the first sequence goes on with the state before
        seen = torch.arange(v.shape[2], device=v.device) < (0 if fresh else bounds[1])
        readers = readers * seen[:, None].to(wide)
        through = readers.new_zeros(batch, heads, width, 1)
    return Piece(out, readers, through, last[-1:] if packed else last)


def apply(through: Tensor | None, state: Tensor) -> Tensor:
    """A S."""
    return state if through is None else through * state if through.shape[-1] == 1 else through @ state


def transposed(through: Tensor | None, grad: Tensor) -> Tensor:
    """Aᵀ G."""
    return grad if through is None else through * grad if through.shape[-1] == 1 else through.mT @ grad


class _Before(torch.autograd.Function):
    """The states before each of this rank's pieces, `(P, B, H, Dk, Dv)`, and after the last token of all.

    Takes this rank's maps, `through (P, B, H, Dk, 1 or Dk)` or None and `written (P, B, H, Dk, Dv)`. One all-gather
    forward; one backward, of the gradients of the states that were read, from which each rank runs back from the end:

        G = dS_i + Aᵢᵀ G'       dB_i = G'       dA_i = G' Sᵢᵀ          G' is that of the state after the piece
    """

    @staticmethod
    def forward(
        ctx: Any, through: Tensor | None, written: Tensor, first: Tensor | None, wire: Wire, order: tuple[Any, ...],
        last_too: bool,
    ) -> Any:  # fmt: skip
        both = written if through is None else torch.cat([through, written], -1)
        gathered = wire.all_gather(both)
        width = 0 if through is None else through.shape[-1]
        mine: dict[int, Tensor] = {}
        passed: list[Tensor | None] = []
        state = torch.zeros_like(written[0]) if first is None else first.to(written.dtype)
        for rank, piece in order:
            if rank == wire.rank:
                mine[piece] = state
            passing, writing = gathered[rank][piece].split([width, written.shape[-1]], -1)
            passed.append(passing if width else None)
            state = apply(passed[-1], state) + writing
        empty = torch.zeros_like(state)
        before = torch.stack([mine.get(i, empty) for i in range(len(written))])
        ctx.save_for_backward(before, *([] if through is None else [torch.stack(passed)]))  # type: ignore[arg-type]
        ctx.given = wire, order, width, last_too, first is not None
        return before, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_last: Tensor) -> Any:
        before, *passed = ctx.saved_tensors
        wire, order, width, last_too, has_first = ctx.given
        given = torch.cat([grad, grad_last.unsqueeze(0)]) if last_too else grad
        gathered = wire.all_gather(given)
        # Every rank may have used the last state, each in its own loss.
        later = torch.stack([g[-1] for g in gathered]).sum(0) if last_too else torch.zeros_like(grad[0])
        d_written, d_through = torch.zeros_like(grad), before.new_zeros(*before.shape[:-1], width)
        for i in range(len(order) - 1, -1, -1):
            rank, piece = order[i]
            through = passed[0][i] if width else None
            if rank == wire.rank:
                d_written[piece] = later
                if width == 1:
                    d_through[piece] = (later * before[piece]).sum(-1, keepdim=True)
                elif width:
                    d_through[piece] = later @ before[piece].mT
            later = gathered[rank][piece] + transposed(through, later)
        # The first state is everyone's; its gradient is counted once, where its piece is.
        d_first = later if has_first and order[0][0] == wire.rank else torch.zeros_like(later) if has_first else None
        return (d_through if width else None), d_written, d_first, None, None, None


class _Sum(torch.autograd.Function):
    """The sum of all ranks' states: one all-gather forward, one backward."""

    @staticmethod
    def forward(ctx: Any, written: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        return torch.stack(wire.all_gather(written)).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.stack(ctx.wire.all_gather(grad)).sum(0), None


def lasp2(
    q: Tensor, k: Tensor, v: Tensor, wire: Wire, layout: Layout, *, decay: Tensor | None, beta: Tensor | None,
    state: Tensor | None, starts: Sequence[int], last_too: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """This rank's outputs, and the state after the last token of all; `starts` are the beginnings of documents.

    Sends, forward: (R − 1) · P · B · H · Dk · (Dv + 1 or Dk) numbers for P pieces on a rank, whatever the length.
    """
    pieces, at = [], 0
    for a, b in layout.pieces[wire.rank]:
        cut = slice(at, at + b - a)
        at = cut.stop
        some_decay, some_beta = (None if x is None else x[:, :, cut] for x in (decay, beta))
        bounds = [0, *(s - a for s in starts if a < s < b), b - a]
        parts = q[:, :, cut], k[:, :, cut], v[:, :, cut], some_decay, some_beta
        pieces.append(piece_of(*parts, bounds, a in starts, backend))
    most = max(len(p) for p in layout.pieces)
    missing = most - len(pieces)  # all ranks gather as much: what is missing changes nothing

    def stacked(parts: list[Tensor], empty: Tensor) -> Tensor:
        return torch.stack([*parts, *(empty for _ in range(missing))])

    written = stacked([p.written for p in pieces], torch.zeros_like(pieces[0].written))
    through: Tensor | None = None
    if starts or decay is not None or beta is not None:
        same = written.new_ones(*written.shape[1:-1], 1)  # A = 1
        throughs = [same if p.through is None else p.through for p in pieces]
        through = stacked(throughs, torch.zeros_like(throughs[0]))
    places = [(a, (rank, i)) for rank, held in enumerate(layout.pieces) for i, (a, b) in enumerate(held) if b > a]
    order = tuple(place for _, place in sorted(places))
    before, last = _Before.apply(through, written, state, wire, order, last_too)
    outs = [_read(p, s) for p, s in zip(pieces, before, strict=False)]
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2), last if last_too else last.detach()


def _read(piece: Piece, state: Tensor) -> Tensor:
    """The outputs of a piece that begins with `state`."""
    if piece.out.dtype != piece.readers.dtype:
        return piece.out + (piece.readers @ state).to(piece.out.dtype)
    flat = (x.flatten(0, 1) for x in (piece.out, piece.readers, state))
    return torch.baddbmm(*flat).view_as(piece.out)


def sums(q: Tensor, k: Tensor, v: Tensor, wire: Wire) -> Tensor:
    """Linear attention without a mask: every query reads the sum of all ranks' states, O = Q Σ_s K_sᵀ V_s."""
    wide = torch.promote_types(v.dtype, torch.float32)
    repeats = v.shape[1] // q.shape[1]
    q, k = (x.to(wide).repeat_interleave(repeats, 1) if repeats > 1 else x.to(wide) for x in (q, k))
    return (q @ _Sum.apply(k.mT @ v.to(wide), wire)).to(v.dtype)


def document_starts(cu_seqlens: Tensor | Sequence[int] | None, length: int) -> tuple[int, ...]:
    """Where documents begin, from the cumulated lengths of the whole sequence."""
    if cu_seqlens is None:
        return ()
    bounds = [int(x) for x in cu_seqlens]
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != length or any(b < a for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to the whole length {length}, got {bounds}")
    return tuple(sorted({*bounds[:-1]} - {length}))
