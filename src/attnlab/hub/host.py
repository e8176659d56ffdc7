"""What a host model hides from its queries (padding, the future, what a cache dropped), and our patterns within it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.attend import attend
from attnlab.hub.placed import Asked, hides_the_future, placed
from attnlab.hub.spelling import Where
from attnlab.patterns import Causal, Pattern

# Up to so many queries at once are a step of decoding: over before a plan is made.
_FEW, _FEW_PAIRS = 32, 2**19
# What hosts add to a score in place of −inf is below this.
_HIDDEN = -1e4


@dataclass(frozen=True, eq=False)
class Rows:
    """Batch entries (all if None) whose real keys are `start` … `end` − 1; their text begins at position `first`."""

    batch: Tensor | None
    start: int
    end: int
    first: int


@dataclass(eq=False)
class Host:
    """How the host masks one call of `nq` queries, the first at position `offset`, and `nk` keys, from `gone` on.

    `base` is what remains when padding is cut off: nothing hidden, the future hidden, or whatever the host says.
    """

    nq: int
    nk: int
    offset: int
    gone: int
    base: Literal["full", "causal"] | Asked
    rows: list[Rows]
    _few: dict[Where | None, tuple[Tensor | slice | None, Tensor | None]] = field(default_factory=dict)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, where: Where | None, *, scale: float | None = None, dropout: float = 0.0,
        bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """q `(B, H, Nq, D)`, k and v `(B, Hkv, Nk, D)` → `(B, H, Nq, Dv)`: what the host and `where` both allow.

        Positions of `where` count from the first real token of each text. A route chooses where a text is read from its
        beginning; what comes later, token by token, sees all that the host lets it see.
        """
        few = self.nq < _FEW and self.nq * self.nk <= _FEW_PAIRS
        if isinstance(where, Pattern):
            few = few and not (where.per_batch or where.per_head)
        elif where is not None:
            few = few and self.nq != self.nk
        if few and not (isinstance(self.base, Asked) and self.base.heads):
            return self._step(q, k, v, where, scale, dropout, bias)
        if len(self.rows) == 1 and self.rows[0].batch is None:
            found = self._part(q, k, v, self.rows[0], where, scale, dropout, bias)
            return found if found.shape[2] == self.nq else F.pad(found, (0, 0, self.nq - found.shape[2], 0))
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        for rows in self.rows:
            at = slice(None) if rows.batch is None else rows.batch
            some = None if bias is None else bias if bias.shape[0] == 1 else bias[at]
            found = self._part(q[at], k[at], v[at], rows, where, scale, dropout, some)
            out[at, :, self.nq - found.shape[2] :] = found
        return out

    def _part(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, where: Where | None, scale: float | None, dropout: float,
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Rows that are padded alike: the queries from the first real one on."""
        apart = self.offset - self.gone  # query i stands at key apart + i
        skip = max(rows.start - apart, 0)
        if self.base == "full" and not isinstance(where, Pattern):
            skip = 0  # what stands in the padding looks too, as it does in the host
        q, k, v = q[:, :, skip:], k[:, :, rows.start : rows.end], v[:, :, rows.start : rows.end]
        if bias is not None:
            bias = bias[:, :, skip:] if bias.shape[2] > 1 else bias
            bias = bias[..., rows.start : rows.end] if bias.shape[3] > 1 else bias
        pattern: Pattern | None = None
        if self.base == "causal":
            pattern = Causal().starting_at(apart + skip - rows.start)
        elif isinstance(self.base, Asked):
            pattern = self.base.cut(rows.batch, skip, rows.start)
        route = None
        if isinstance(where, Pattern):
            here = placed(where, self.offset + skip - rows.first, self.gone + rows.start - rows.first)
            pattern = self._joined(here, pattern, where)
        elif where is not None and q.shape[2] == k.shape[2]:
            route = where
        return attend(q, k, v, pattern=pattern, route=route, scale=scale, dropout=dropout, bias=bias)

    def pattern(self, where: Pattern | None) -> Pattern | None:
        """The same as one pattern: what is seen by all queries and keys of the call; None where nothing is hidden."""
        rows, apart = self.rows[0], self.offset - self.gone
        end = apart + self.nq if self.base == "causal" else self.nk
        if len(self.rows) > 1 or rows.batch is not None or rows.start or rows.end < end or isinstance(self.base, Asked):
            return Within(self, where)
        base = Causal().starting_at(apart) if self.base == "causal" else None
        return self._joined(None if where is None else placed(where, self.offset, self.gone), base, where)

    def _joined(self, here: Pattern | None, base: Pattern | None, where: Pattern | None) -> Pattern | None:
        """Both what `where` says `here` and what the host's `base` says, unless the one says it for the other."""
        if here is None or base is None:
            return base if here is None else here
        return here if self.base == "causal" and where is not None and hides_the_future(where) else here & base

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, where: Where | None, scale: float | None, dropout: float,
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """A few queries: the keys that any of them sees, and torch's kernel."""
        pattern = where if isinstance(where, Pattern) else None
        if pattern not in self._few:
            self._few[pattern] = self._seen(pattern, len(q), q.device)
        at, mask = self._few[pattern]
        if at is not None:
            k, v = k[:, :, at], v[:, :, at]
            bias = bias if bias is None or bias.shape[3] == 1 else bias[..., at]
        if not k.shape[2]:
            return q.new_zeros(*q.shape[:3], v.shape[-1])
        dead = None
        if mask is not None:
            dead = ~mask.any(-1, keepdim=True)
            mask = mask | dead
        if bias is not None:
            mask = bias.to(q.dtype) if mask is None else torch.where(mask, bias.to(q.dtype), -math.inf)
        if mask is not None and mask.shape[1] > 1:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        # Heads that share their keys are as many queries, all at one place if there is but one.
        alone = q.shape[2] == 1 and k.shape[1] < q.shape[1]
        rows = q.view(len(q), k.shape[1], -1, q.shape[3]) if alone else q
        out = F.scaled_dot_product_attention(
            rows, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=k.shape[1] < rows.shape[1]
        ).reshape(*q.shape[:3], v.shape[-1])
        return out if dead is None or not dead.any() else out.masked_fill(dead, 0.0)

    def _seen(self, where: Pattern | None, batch: int, at: torch.device) -> tuple[Tensor | slice | None, Tensor | None]:
        """The keys that some query sees (None: all), and of those the mask `(B or 1, H or 1, Nq, n)` (None: all)."""
        zero = torch.zeros((), dtype=torch.long, device=at)
        q, k = torch.arange(self.nq, device=at)[:, None], torch.arange(self.nk, device=at)
        seen = torch.zeros(1 if self._alike else batch, 1, self.nq, self.nk, dtype=torch.bool, device=at)
        if isinstance(self.base, Asked):
            b = torch.arange(len(seen), device=at).view(-1, 1, 1, 1)
            host = self.base.allows(b, zero, q, k)
        else:
            host = (k <= q + (self.offset - self.gone)) | (self.base == "full")
        for rows in self.rows:
            real = host & (k >= rows.start) & (k < rows.end)
            if where is not None:
                here = placed(where, self.offset - rows.first, self.gone - rows.first)
                real = real & here.allows(zero, zero, q, k)
            chosen = slice(None) if rows.batch is None else rows.batch
            seen[chosen] = real[chosen] if real.dim() == 4 and len(real) > 1 else real
        wanted = seen.any(dim=(0, 1, 2))
        if wanted.all():
            return None, None if seen.all() else seen
        places = wanted.nonzero()[:, 0]
        index: Tensor | slice = places
        if len(places) and int(places[-1] - places[0]) == len(places) - 1:
            index = slice(int(places[0]), int(places[-1]) + 1)  # keys that lie together are not copied
        seen = seen[..., index]
        return index, None if seen.all() else seen

    @property
    def _alike(self) -> bool:
        return len(self.rows) == 1 and self.rows[0].batch is None and not isinstance(self.base, Asked)


@dataclass(frozen=True, eq=False)
class Within(Pattern):
    """What a host and `where` both allow in one call, sample by sample; equal to itself alone."""

    host: Host
    where: Pattern | None
    per_batch = True
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        asked = isinstance(self.host.base, Asked) and self.host.base.heads
        object.__setattr__(self, "per_head", asked or (self.where is not None and self.where.per_head))

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        host = self.host
        seen = torch.zeros(
            torch.broadcast_shapes(b.shape, h.shape, q.shape, k.shape), dtype=torch.bool, device=q.device
        )
        for rows in host.rows:
            mine = (b == b) if rows.batch is None else torch.isin(b, rows.batch.to(b.device))
            real = (k >= rows.start) & (k < rows.end)
            if isinstance(host.base, Asked):
                real = real & host.base.allows(b, h, q, k)
            elif host.base == "causal":
                real = real & (k <= q + (host.offset - host.gone))
            if self.where is not None:
                real = real & placed(self.where, host.offset - rows.first, host.gone - rows.first).allows(b, h, q, k)
            seen = seen | (mine & real)
        return seen

    def tile_keys(self, tiles: Tensor, nk: int) -> Tensor | None:
        if self.where is None or len({rows.first for rows in self.host.rows}) > 1:
            return None
        first = self.host.rows[0].first
        return placed(self.where, self.host.offset - first, self.host.gone - first).tile_keys(tiles, nk)

    def __str__(self) -> str:
        return f"{self.where or 'all'} within what the model allows"


def padded(real: Tensor | None, nq: int, nk: int, gone: int, offset: int, causal: bool) -> list[Rows] | None:
    """The batch entries by how they are padded: `real (B, ≥ gone + nk)` is True at real keys; None if it has holes."""
    last = offset + nq - gone if causal else nk  # what a cache has not filled yet lies behind it
    if real is None:
        return [Rows(None, 0, min(last, nk), 0)]
    places = real.long()
    first = places.argmax(1)
    here = real[:, gone : gone + nk]
    count = here.sum(1)
    start = (first - gone).clamp_min(0)
    if not torch.equal(here, _between(start, start + count, nk)):
        return None
    table = torch.stack([start, start + count, first], 1).tolist()
    if all(row == table[0] for row in table):
        return [Rows(None, table[0][0], min(table[0][1], last), table[0][2])]
    kinds: dict[tuple[int, int, int], list[int]] = {}
    for i, (a, b, c) in enumerate(table):
        kinds.setdefault((a, min(b, last), c), []).append(i)
    return [Rows(torch.tensor(some, device=real.device), *kind) for kind, some in kinds.items()]


def _between(start: Tensor, end: Tensor, n: int) -> Tensor:
    at = torch.arange(n, device=start.device)
    return (at >= start[:, None]) & (at < end[:, None])


def tensor_host(
    mask: Tensor | None, causal: bool, batch: int, nq: int, nk: int, *, crossing: bool = False,
    at: tuple[int, int] | None = None,
) -> Host:  # fmt: skip
    """What a mask handed to an attention call hides: bool, or added to the scores with 0 and very negative entries.

    `at` are the positions of the first query and of the first key. Where they are not known they are read off the mask:
    the last key that anybody sees is where the last query stands; without a mask, fewer queries than keys stand at the
    end (unless `crossing`, where they are of two texts). Reads `mask` once or twice.
    """
    offset, gone = (0, 0) if at is None else at
    if mask is None:
        if at is None:
            offset = 0 if crossing or causal or nq >= nk else nk - nq
        rows = padded(None, nq, nk, gone, offset, causal) or []
        return Host(nq, nk, offset, gone, "causal" if causal else "full", rows)
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    if mask.dtype != torch.bool:
        mask = mask > _HIDDEN
    columns = mask.any(dim=(1, 2)).expand(batch, nk)
    if at is None and not crossing and nq < nk:
        last = int(columns.any(0).long().mul(torch.arange(1, nk + 1, device=mask.device)).max())
        offset = max(last - nq, 0)
    for base in ("full", "causal"):
        if base == "causal" and crossing:
            continue
        found = padded(columns, nq, nk, 0, offset - gone, base == "causal")
        if found is not None and all(_agrees(mask, row, base, offset - gone, nq) for row in found):
            return Host(nq, nk, offset, gone, base, [_beyond(row, gone) for row in found])
    starts = columns.long().argmax(1).tolist()
    kinds: dict[int, list[int]] = {}
    for i, start in enumerate(starts):
        kinds.setdefault(start, []).append(i)
    every = torch.arange(batch, device=mask.device)

    def ask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        zero = torch.zeros_like(b)
        return mask[tuple(i if n > 1 else zero for n, i in zip(mask.shape, (b, h, q, k), strict=True))]

    rows = [
        _beyond(Rows(None if len(kinds) == 1 else every[some], 0, nk, start), gone) for start, some in kinds.items()
    ]
    return Host(nq, nk, offset, gone, Asked(ask, every, heads=mask.shape[1] > 1), rows)


def _beyond(rows: Rows, gone: int) -> Rows:
    """Rows of a cache that has dropped its first keys: a text that begins where it does began before."""
    return Rows(rows.batch, rows.start, rows.end, rows.first + gone if rows.first else 0) if gone else rows


def _agrees(mask: Tensor, rows: Rows, base: str, offset: int, nq: int) -> bool:
    """Whether the mask of these batch entries is `base` between start and end, for the queries that are real."""
    some = mask if rows.batch is None or len(mask) == 1 else mask[rows.batch]
    k = torch.arange(mask.shape[3], device=mask.device)
    wanted = (k >= rows.start) & (k < rows.end)
    if base == "causal":
        q = torch.arange(offset, offset + nq, device=mask.device)[:, None]
        wanted = wanted & (k <= q)
        if some.shape[2] > 1:
            skip = max(rows.start - offset, 0)
            some, wanted = some[:, :, skip:], wanted[skip:]
    return bool((some == wanted).all())
