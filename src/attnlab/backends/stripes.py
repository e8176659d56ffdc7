"""All scores of dense attention, a stripe at a time: some queries of some heads against every key that they may see.

For reading the scores, not for the output alone (the fused kernel is faster at that). Memory grows with the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.problem import Bias, Problem

# Scores per stripe: enough for products to be fast, on a processor and on an accelerator.
_HERE, _THERE = 2**21, 2**25
# What hides a pair where scores are finite: with it, weight times logarithm is 0 without asking.
_LOW = -1e30


@dataclass(frozen=True, eq=False)
class Stripe:
    """Scores `(h, q, k)` of one batch entry, to be read or overwritten before the next stripe comes.

    A pair that may not look scores `hidden`: −inf where a bias or an added mask may hold that too, else a number far
    below any score. `spare` is as large as the scores, for what is made of them.
    """

    b: int
    heads: slice
    kv_heads: slice
    queries: slice
    keys: slice
    scores: Tensor
    spare: Tensor
    hidden: float


def stripes(p: Problem, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Iterator[Stripe]:
    """Every pair of `p` that may look, exactly once, in at least float32.

    `mask (B|1, H|1, Nq|1, Nk)` is bool (True: may look) or added to the scores. The pattern must be one for all heads
    and batch entries. Keys that no query of a stripe may see, at either end, are not scored at all.
    """
    wide = torch.promote_types(p.dtype, torch.float32)
    room = _HERE if q.device.type == "cpu" else _THERE
    count = min(p.nq, max(1, room // (p.groups * p.nk)))
    together = min(p.kv_heads, max(1, room // (p.groups * count * p.nk)))
    size = together * p.groups * count * p.nk
    buffer, spare = torch.empty(2, size, dtype=wide, device=q.device)
    own_mask = mask is not None and mask.shape[0] > 1
    hidden = _LOW if p.bias is None and (mask is None or mask.dtype is torch.bool) else -torch.inf
    # Cast once, not at every stripe.
    k = k.to(wide)
    for start in range(0, p.nq, count):
        queries = slice(start, min(start + count, p.nq))
        if not own_mask:
            common = _visible(p, mask, 0, queries)
        for b in range(p.batch):
            seen, mixed, keys = _visible(p, mask, b, queries) if own_mask else common
            n, rows = keys.stop - keys.start, queries.stop - queries.start
            for first in range(0, p.kv_heads if n else 0, together):
                kv = slice(first, min(first + together, p.kv_heads))
                heads = slice(kv.start * p.groups, kv.stop * p.groups)
                scores = buffer[: (heads.stop - heads.start) * rows * n].view(kv.stop - kv.start, p.groups * rows, n)
                mine = (q[b, heads, queries].to(wide) * p.scale).reshape(len(scores), p.groups * rows, -1)
                torch.bmm(mine, k[b, kv, keys].mT, out=scores)
                scores = scores.view(-1, rows, n)
                if p.bias is not None:
                    scores += values(p.bias, b, heads, queries, keys, p.device)
                if mask is not None and mask.is_floating_point():
                    scores += values(mask, b, heads, queries, keys, p.device)
                elif mask is not None and mask.shape[1] > 1:
                    scores.masked_fill_(~values(mask, b, heads, queries, keys, p.device), hidden)
                if seen is not None:
                    scores[..., mixed].masked_fill_(~seen, hidden)
                yield Stripe(b, heads, kv, queries, keys, scores, spare[: scores.numel()].view(scores.shape), hidden)


def values(x: Bias, b: int, heads: slice, queries: slice, keys: slice, device: torch.device) -> Tensor:
    """What a tensor or function of (batch, head, query, key) says of one block, broadcastable to `(h, q, k)`."""
    if isinstance(x, Tensor):
        x = x.reshape((1,) * (4 - x.dim()) + x.shape)
        block, cuts = x[b if len(x) > 1 else 0], (heads, queries, keys)
        return block[tuple(s if n > 1 else slice(None) for n, s in zip(block.shape, cuts, strict=True))]
    h, q, k = (torch.arange(s.start, s.stop, device=device) for s in (heads, queries, keys))
    return x(torch.full_like(k[:1], b), h[:, None, None], q[:, None], k)


def _visible(p: Problem, mask: Tensor | None, b: int, queries: slice) -> tuple[Tensor | None, slice, slice]:
    """The keys that some of `queries` may see, from the first to the last, and where among these not all may look.

    Returns which query sees which key there, or None if nothing is hidden; that part; and the keys.
    """
    # What a causal pattern hides behind the last query is not even asked for.
    every = slice(0, min(p.nk, queries.stop) if p.is_causal else p.nk)
    seen = None
    if not p.is_full:
        at_q, at_k = (torch.arange(s.start, s.stop, device=p.device) for s in (queries, every))
        zero = torch.zeros_like(at_k[:1])
        seen = p.pattern.allows(zero, zero, at_q[:, None], at_k).expand(-1, every.stop)
    if mask is not None and mask.shape[1] == 1:
        given = values(mask, b, slice(0, 1), queries, every, p.device)[0]
        if given.is_floating_point():
            # The smallest number, as good as −inf, hides a key unless it is all that a query has.
            likely = given > torch.finfo(given.dtype).min / 2
            likely = likely if seen is None else likely & seen
            hopeless = ~likely.any(-1, keepdim=True)
            given = likely | (hopeless if seen is None else hopeless & seen)
        seen = given if seen is None else seen & given
    if seen is None:
        return None, every, every
    keys = _span(seen.any(0))
    hidden = _span(~seen[:, keys].all(0))
    return (seen[:, keys][:, hidden] if hidden.stop else None), hidden, keys


def _span(some: Tensor) -> slice:
    """From the first to the last True."""
    places = some.nonzero()
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)
