"""The last few tokens before each piece of a rank: what a short convolution over the sequence has to see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab.scale.layout import Layout
from attnlab.scale.wire import Wire


class _Before(torch.autograd.Function):
    """`x (B, n, C)` → for each of the rank's pieces the `count` tokens before it, `(P, B, count, C)`; zeros at 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire, layout: Layout, count: int) -> Tensor:
        ctx.given = wire, layout, count, x.shape
        held = layout.pieces[wire.rank]
        ends = [part[:, -count:] for part in x.split([b - a for a, b in held], 1)]
        gathered = wire.all_gather(_filled(ends, layout))
        found = x.new_zeros(len(held), len(x), count, x.shape[2])
        for i, (start, _) in enumerate(held):
            if start:
                rank, j = _ending(layout, start)
                found[i] = gathered[rank][j]
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        wire, layout, count, shape = ctx.given
        gathered = wire.all_gather(_filled(list(grad), layout))
        found, at = grad.new_zeros(shape), 0
        for start, stop in layout.pieces[wire.rank]:
            at += stop - start
            if stop < layout.length:
                rank, j = _beginning(layout, stop)
                found[:, at - count : at] += gathered[rank][j]
        return found, None, None, None


def _filled(parts: list[Tensor], layout: Layout) -> Tensor:
    """As many parts on each rank as on the one with the most."""
    most = max(len(p) for p in layout.pieces)
    return torch.stack([*parts, *(torch.zeros_like(parts[0]) for _ in range(most - len(parts)))])


def _ending(layout: Layout, at: int) -> tuple[int, int]:
    return next((r, i) for r, held in enumerate(layout.pieces) for i, (_, b) in enumerate(held) if b == at)


def _beginning(layout: Layout, at: int) -> tuple[int, int]:
    return next((r, i) for r, held in enumerate(layout.pieces) for i, (a, b) in enumerate(held) if a == at and b > a)


def tokens_before(x: Tensor, wire: Wire, layout: Layout, count: int) -> Tensor:
    """The `count` tokens before each piece, `(P, B, count, C)`, differentiable. Sends (R − 1) · P · B · count · C."""
    shortest = min(b - a for held in layout.pieces for a, b in held)
    if shortest < count:
        raise ValueError(
            f"every piece must hold at least the {count} tokens that the next one looks back at, got {shortest}"
        )
    return _Before.apply(x, wire, layout, count)
