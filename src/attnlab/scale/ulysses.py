"""All-to-all attention (Ulysses): each rank trades its part of the length for a part of the heads, and back.

Between the two trades every rank holds the whole sequence for H/R heads, so any backend, pattern and weighting will do.
Within, a ring over other ranks may take the place of the whole sequence (USP). Sources: arXiv 2309.14509, 2405.07719.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab.attend import attend
from attnlab.patterns import Pattern
from attnlab.problem import Bias, Lookup
from attnlab.scale.layout import Layout
from attnlab.scale.wire import Wire


class _Trade(torch.autograd.Function):
    """`(B, h, n, D)` of all heads to the rank's own heads of all tokens, rank after rank; or back.

    `heads[r]` lists the heads that rank r gets, which may repeat or overlap.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire, heads: tuple[tuple[int, ...], ...], lengths: tuple[int, ...]) -> Any:
        ctx.given = wire, heads, lengths, x.shape
        return _spread(x, wire, heads, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        wire, heads, lengths, shape = ctx.given
        found = grad.new_zeros(shape)
        for r, part in enumerate(_collect(grad, wire, heads, lengths)):
            found.index_add_(1, torch.tensor(heads[r], device=grad.device), part)
        return found, None, None, None


class _Back(torch.autograd.Function):
    """The own heads of all tokens to all heads of the own tokens; the heads are disjoint and in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire, heads: tuple[tuple[int, ...], ...], lengths: tuple[int, ...]) -> Any:
        ctx.given = wire, heads, lengths
        return torch.cat(_collect(x, wire, heads, lengths), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _spread(grad, *ctx.given), None, None, None


def _spread(x: Tensor, wire: Wire, heads: Sequence[Sequence[int]], lengths: Sequence[int]) -> Tensor:
    mine = len(heads[wire.rank])
    parts = [x[:, list(h)].contiguous() for h in heads]
    wanted = [x.new_empty(len(x), mine, n, x.shape[-1]) for n in lengths]
    wire.all_to_all(parts, wanted)
    return torch.cat(wanted, 2)


def _collect(x: Tensor, wire: Wire, heads: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[Tensor]:
    """What each rank has found for its heads, of the own tokens."""
    parts = [part.contiguous() for part in x.split(list(lengths), 2)]
    wanted = [x.new_empty(len(x), len(h), lengths[wire.rank], x.shape[-1]) for h in heads]
    wire.all_to_all(parts, wanted)
    return wanted


@dataclass(frozen=True)
class HeadsFrom(Pattern):
    """A pattern that depends on the head, for heads that begin at `first`."""

    pattern: Pattern
    first: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "per_batch", self.pattern.per_batch)
        object.__setattr__(self, "per_head", True)

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.pattern.allows(b, h + self.first, q, k)

    def at(self, b: int, h: int) -> Pattern:
        return self.pattern.at(b, h + self.first)

    def check(self, nq: int, nk: int) -> None:
        self.pattern.check(nq, nk)


def heads_of(wire: Wire, heads: int, kv_heads: int) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """The query heads of each rank, and the key heads that those need: as few as still make a grouping."""
    if heads % wire.size:
        raise ValueError(f"q's heads must be a multiple of the {wire.size} ranks for all-to-all, got {heads}")
    each, groups = heads // wire.size, heads // kv_heads
    queries = [tuple(range(r * each, (r + 1) * each)) for r in range(wire.size)]
    if each % groups and groups % each:
        return tuple(queries), tuple(tuple(h // groups for h in mine) for mine in queries)
    return tuple(queries), tuple(tuple(sorted({h // groups for h in mine})) for mine in queries)


def part_of_bias(bias: Bias | None, first: int, count: int) -> Bias | None:
    """The bias of `count` heads from `first` on."""
    if bias is None:
        return None
    if isinstance(bias, Tensor):
        return bias if bias.dim() < 3 or bias.shape[-3] == 1 else bias.narrow(-3, first, count)
    if isinstance(bias, Lookup):
        return Lookup(bias.table[:, first : first + count], bias.row)
    return lambda b, h, q, k: bias(b, h + first, q, k)


# Attention of some heads of all tokens of a group, which lie in the order of their positions: out and lse.
Within = Callable[[Tensor, Tensor, Tensor, Pattern | None, Bias | None], tuple[Tensor, Tensor | None]]


def ulysses(
    q: Tensor, k: Tensor, v: Tensor, wire: Wire, layout: Layout, keys: Layout, within: Within, *,
    pattern: Pattern | None = None, bias: Bias | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """This rank's outputs and lse; `within` attends for H/R heads, and `bias` is that of all its tokens.

    Sends, forward: (R − 1)/R of q, k, v and the output (key heads that several ranks need go to each); backward: again.
    """
    queries, needed = heads_of(wire, q.shape[1], k.shape[1])
    first, each = queries[wire.rank][0], len(queries[wire.rank])

    def trade(x: Tensor, heads: tuple[tuple[int, ...], ...], at: Layout) -> Tensor:
        whole = _Trade.apply(x, wire, heads, at.lengths)
        return whole if at.in_order else whole.index_select(2, at.order(x.device).argsort())

    if pattern is not None and pattern.per_head:
        pattern = HeadsFrom(pattern, first)
    out, lse = within(
        trade(q, queries, layout), trade(k, needed, keys), trade(v, needed, keys),
        pattern, part_of_bias(bias, first, each),
    )  # fmt: skip

    def back(x: Tensor) -> Tensor:
        x = x if layout.in_order else x.index_select(2, layout.order(x.device).argsort().argsort())
        return _Back.apply(x.contiguous(), wire, queries, layout.lengths)

    return back(out), None if lse is None else back(lse.unsqueeze(-1)).squeeze(-1)


def alone(**keywords: Any) -> Within:
    """The attention of one process."""

    def within(
        q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | None, bias: Bias | None
    ) -> tuple[Tensor, Tensor | None]:
        found = attend(q, k, v, pattern=pattern, bias=bias, **keywords)
        return found if isinstance(found, tuple) else (found, None)

    return within


class _Gather(torch.autograd.Function):
    """Everyone's heads, side by side; backward each rank takes the sum of what all found about its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        return torch.cat(wire.all_gather(x), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        wire: Wire = ctx.wire
        parts = [part.contiguous() for part in grad.chunk(wire.size, 1)]
        found = [torch.empty_like(parts[0]) for _ in range(wire.size)]
        wire.all_to_all(parts, found)
        return torch.stack(found).sum(0), None


def by_heads(
    q: Tensor, k: Tensor, v: Tensor, wire: Wire, *, pattern: Pattern | None = None, bias: Bias | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Multi-head attention of which each rank computes H/R heads of all rows; every rank gets all outputs.

    q, k, v are whole and the same on all ranks. Their gradients here are those through the rank's own heads: the sum
    over the ranks is the whole, if each rank's loss is its own share.
    """
    queries, needed = heads_of(wire, q.shape[1], k.shape[1])
    mine, theirs = list(queries[wire.rank]), list(needed[wire.rank])
    if pattern is not None and pattern.per_head:
        pattern = HeadsFrom(pattern, mine[0])
    own = part_of_bias(bias, mine[0], len(mine))
    out, lse = alone(**keywords)(q[:, mine], k[:, theirs], v[:, theirs], pattern, own)
    whole_lse = None if lse is None else _Gather.apply(lse.contiguous(), wire)
    return _Gather.apply(out.contiguous(), wire), whole_lse
