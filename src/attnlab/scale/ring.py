"""Ring attention: every rank keeps its queries, keys and values travel, and what is found is merged by its log-sum-exp.

Only the ranges of keys travel of which some query of the receiver sees something. The backward is a second round: each
block's gradients are recomputed from the saved outputs and lse, and those of keys and values travel home.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from attnlab.attend import attend
from attnlab.patterns import Pattern
from attnlab.problem import Bias, Lookup
from attnlab.scale.gradients import Rows, block_gradients
from attnlab.scale.layout import Layout
from attnlab.scale.visible import Block, Range, blocks, needed
from attnlab.scale.wire import Wire


@dataclass(frozen=True, eq=False)
class Job:
    """One call, without the values: where queries and keys lie, who sees whom, and how keys come.

    `gather` brings all keys to all ranks by one collective, instead of block by block; `chunk` bounds the keys that
    are worked on at a time; `window` ranks that are neighbours make an inner ring, which is gone round before the next.
    """

    wire: Wire
    queries: Layout
    keys: Layout
    pattern: Pattern
    scale: float
    bias: Bias | None = None
    gather: bool = False
    chunk: int | None = None
    window: int | None = None

    def partners(self, step: int) -> tuple[int, int]:
        """To whom my keys go in a step, and from whom others come; in step 0 both are myself.

        One ring: r − t and r + t. With a window of w: round my own inner ring of w ranks, then round the next one, …
        (the double ring of LoongTrain, arXiv 2406.18485): all but one in w steps stay among neighbours.
        """
        rank, size = self.wire.rank, self.wire.size
        window = self.window or size
        (group, place), (outer, inner) = divmod(rank, window), divmod(step, window)
        to = (group - outer) % (size // window) * window + (place - inner) % window
        return to, (group + outer) % (size // window) * window + (place + inner) % window

    def wanted(self, receiver: int, sender: int) -> tuple[Range, ...]:
        """The ranges of the sender's keys that the receiver is to get."""
        held = self.keys.pieces[sender]
        if self.gather:
            return held if self.keys.lengths[sender] else ()
        return needed(self.pattern, self.queries.pieces[receiver], held)

    def blocks(self, sender: int) -> tuple[Block, ...]:
        mine = self.queries.pieces[self.wire.rank]
        return blocks(self.pattern, mine, self.wanted(self.wire.rank, sender), self.chunk)

    def bias_of(self, block: Block) -> Bias | None:
        """The bias as the block's own indices see it."""
        if self.bias is None:
            return None
        if isinstance(self.bias, Tensor):
            rows, columns = self._part(self.bias, block)
            return self.bias[..., rows, :][..., columns]
        at = _Placed(block.at, block.keys_at)
        if isinstance(self.bias, Lookup):
            return Lookup(self.bias.table, _PlacedRow(self.bias.row, at))
        whole_bias = self.bias
        return lambda b, h, q, k: whole_bias(b, h, *at(q, k))

    def _part(self, bias: Tensor, block: Block) -> tuple[slice, Any]:
        """The rows and columns of a tensor that are a block's."""
        columns = torch.cat([torch.arange(a, b, device=bias.device) for a, b in block.keys_at])
        return block.q if bias.shape[-2] > 1 else slice(None), columns if bias.shape[-1] > 1 else slice(None)

    def add_bias(self, total: Tensor | None, found: Tensor, block: Block) -> Tensor:
        """The gradient of the bias's table or tensor, with what was found in one block."""
        if not isinstance(self.bias, Tensor):
            return found if total is None else total + found
        total = torch.zeros_like(self.bias) if total is None else total
        rows, columns = self._part(self.bias, block)
        part = total[..., rows, :]
        if isinstance(columns, slice):
            part += found
        else:
            part.index_add_(-1, columns, found)
        return total


@dataclass(frozen=True)
class _Placed:
    """Rows and columns of a block as positions in the sequence."""

    queries: tuple[Range, ...]
    keys: tuple[Range, ...]

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return _place(q, self.queries), _place(k, self.keys)


@dataclass(frozen=True)
class _PlacedRow:
    """The row of a bias table, asked by a block's own indices."""

    row: Any
    at: _Placed

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return self.row(*self.at(q, k))


def _place(index: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    if len(ranges) == 1:
        return index + ranges[0][0]
    table = torch.cat([torch.arange(a, b, device=index.device) for a, b in ranges])
    return table[index.clamp_max(len(table) - 1)]


def ring_attention(q: Tensor, k: Tensor, v: Tensor, job: Job) -> tuple[Tensor, Tensor]:
    """This rank's outputs `(B, H, n, Dv)` and lse `(B, H, n)`, both differentiable (once).

    Sends, forward: at most (R − 1) · B · Hkv · n · (D + Dv) numbers; backward: twice as many.
    """
    table = job.bias.table if isinstance(job.bias, Lookup) else job.bias if isinstance(job.bias, Tensor) else None
    out, lse = _Ring.apply(q, k, v, table, job)
    return out, lse


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, job: Job) -> Any:
        out, lse = _forward(q, k, v, job)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.job = job
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        # All ranks take part in the round even where a loss does not reach this one.
        grad = torch.zeros_like(out) if grad is None else grad
        return (*_backward(q, k, v, out, lse, grad, grad_lse, ctx.job, ctx.needs_input_grad[3]), None)


def _forward(q: Tensor, k: Tensor, v: Tensor, job: Job) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    found: tuple[Tensor, Tensor] | None = None
    for sender, pair in _arrivals(k, v, job):
        for block in job.blocks(sender) if pair else ():
            part, part_lse = attend(
                q[:, :, block.q].contiguous(), *(x[:, :, block.k].to(q.device) for x in pair), pattern=block.pattern,
                bias=job.bias_of(block), scale=job.scale, return_lse=True,
            )  # fmt: skip
            if found is None and part.shape[2] == q.shape[2]:  # the first part of all queries is what there is
                found = part.to(wide), part_lse.to(wide)
                continue
            found = found or _nothing(q, v, wide)
            _merge(found[0][:, :, block.q], found[1][:, :, block.q], part, part_lse)
    out, lse = found or _nothing(q, v, wide)
    return out.to(q.dtype), lse


def _nothing(q: Tensor, v: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The output and lse of queries that have seen no key."""
    lse = q.new_full(q.shape[:-1], -math.inf, dtype=wide)
    return q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=wide), lse


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge a part over other keys into `out` and `lse`, in place."""
    total = torch.logaddexp(lse, part_lse.to(lse.dtype))
    at = total.masked_fill(total == -math.inf, 0.0)
    out.mul_((lse - at).exp_().unsqueeze(-1)).addcmul_(part.to(out.dtype), (part_lse - at).exp_().unsqueeze(-1))
    lse.copy_(total)


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None, job: Job,
    table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    wire, wide = job.wire, lse.dtype
    r, widths = wire.rank, [k.shape[3], v.shape[3]]
    dq, own = None, None
    d_table: Tensor | None = None
    homecoming: list[Callable[[Tensor, Tensor], None]] = []
    for step, (sender, pair) in enumerate(_arrivals(k, v, job)):
        d_pair: tuple[Tensor, ...] = ()
        for block in job.blocks(sender) if pair else ():
            rows = slice(None), slice(None), block.q
            more_lse = None if grad_lse is None else grad_lse[rows].contiguous()
            mine = (x[rows].contiguous() for x in (q, out, lse, grad))
            given = Rows(*mine, more_lse)  # type: ignore[call-arg]
            keys, values = (x[:, :, block.k].to(q.device) for x in pair)
            found = block_gradients(given, keys, values, block.pattern, job.bias_of(block), job.scale, table)
            dq = _sum(dq, found[0], block.q, q, wide)
            before: tuple[Tensor | None, ...] = d_pair or (None, None)
            pieces = zip(before, (found[1], found[2]), pair, strict=True)
            d_pair = tuple(_sum(d, new, block.k, like, wide) for d, new, like in pieces)
            if found[3] is not None:
                d_table = job.add_bias(d_table, found[3], block)
        if pair and not d_pair:
            d_pair = tuple(torch.zeros_like(x, dtype=wide) for x in pair)
        if sender == r:
            whole = bool(pair) and pair[0].shape[2] == k.shape[2]
            own = d_pair if whole else tuple(torch.zeros_like(x, dtype=wide) for x in (k, v))
            if pair and not whole:
                _add(own[0], own[1], job.keys.pieces[r], job.wanted(r, r), *d_pair)
            continue
        while homecoming:
            homecoming.pop()(*own)  # type: ignore[misc]
        # What was found here about the sender's keys goes home, and what another rank found about mine comes.
        asker, _ = job.partners(step)
        ranges = job.wanted(asker, r)
        room = k.new_empty(*k.shape[:2], sum(b - a for a, b in ranges), sum(widths))
        sends = [(sender, torch.cat(d_pair, -1).to(k.dtype))] if pair else []
        wait = wire.exchange(sends, [(asker, room)] if room.shape[2] else [])
        homecoming.append(partial(_arrive, wait, room, widths, job.keys.pieces[r], ranges))
    while homecoming:
        homecoming.pop()(*own)  # type: ignore[misc]
    dq = torch.zeros_like(q) if dq is None else dq
    dk, dv = own  # type: ignore[misc]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_table


def _sum(total: Tensor | None, part: Tensor, rows: slice, like: Tensor, wide: torch.dtype) -> Tensor:
    """`total` with what was found for some rows; the first part of all rows is the total."""
    if total is None and part.shape[2] == like.shape[2]:
        return part.to(like.device, wide)
    total = torch.zeros_like(like, dtype=wide) if total is None else total
    total[:, :, rows] += part.to(total.device)
    return total


def _arrive(
    wait: Callable[[], None], room: Tensor, widths: list[int], held: tuple[Range, ...], ranges: tuple[Range, ...],
    dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    wait()
    if room.shape[2]:
        _add(dk, dv, held, ranges, *room.split(widths, -1))


def _add(dk: Tensor, dv: Tensor, held: tuple[Range, ...], ranges: tuple[Range, ...], *parts: Tensor) -> None:
    """Add the rows of `parts`, which stand at `ranges`, to those of the gradients, which stand at `held`."""
    for part, whole in zip(parts, (dk, dv), strict=True):
        for rows, piece in zip(_rows(held, ranges), part.split([b - a for a, b in ranges], 2), strict=True):
            whole[:, :, rows] += piece


def _rows(held: tuple[Range, ...], ranges: tuple[Range, ...]) -> list[slice]:
    """Where ranges of the sequence lie among the rows that a rank holds."""
    found = []
    for a, b in ranges:
        at = 0
        for start, stop in held:
            if start <= a and b <= stop:
                found.append(slice(at + a - start, at + b - start))
                break
            at += stop - start
    return found


def _arrivals(k: Tensor, v: Tensor, job: Job) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Each rank's wanted keys and values, my own first; the next are on their way while one is worked on.

    In which order, `Job.partners` says; of a rank that holds nothing to see, an empty pair.
    """
    wire = job.wire
    r, size, widths = wire.rank, wire.size, [k.shape[3], v.shape[3]]

    def pick(receiver: int) -> list[Tensor]:
        rows = _rows(job.keys.pieces[r], job.wanted(receiver, r))
        return [torch.cat([x[:, :, i] for i in rows], 2) if len(rows) > 1 else x[:, :, rows[0]] for x in (k, v)]

    if job.gather:
        missing = max(job.keys.lengths) - k.shape[2]
        parts = wire.all_gather(pad(torch.cat([k, v], -1), (0, 0, 0, missing)))
        for sender in (job.partners(step)[1] for step in range(size)):
            found = parts[sender][:, :, : job.keys.lengths[sender]].split(widths, -1)
            yield sender, found if job.keys.lengths[sender] else ()
        return

    def start(step: int) -> tuple[int, Tensor, Callable[[], None]]:
        to, sender = job.partners(step)
        room = k.new_empty(*k.shape[:2], sum(b - a for a, b in job.wanted(r, sender)), sum(widths))
        sends = [(to, torch.cat(pick(to), -1))] if job.wanted(to, r) else []
        return sender, room, wire.exchange(sends, [(sender, room)] if room.shape[2] else [])

    ahead = start(1) if size > 1 else None
    yield r, tuple(pick(r)) if job.wanted(r, r) else ()
    for step in range(1, size):
        if ahead is not None:
            sender, room, wait = ahead
            wait()
            ahead = start(step + 1) if step + 1 < size else None
            yield sender, room.split(widths, -1) if room.shape[2] else ()
