"""Superlinear attention: every query searches the whole past for anchors and attends to spans at the best of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnlab.attend import attend
from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import KVCache
from attnlab.nn.mechanism import split_heads
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Causal, Pattern, Window

# The score of an anchor that does not exist, and how many gathered numbers are held at a time.
MISSING = -1e9
_HELD = 2**22


class Spans(NamedTuple):
    """What a search found, each `(B, H, Nq, k)`: best first, and −1 as the anchor where there is none.

    A span is the keys from `start` to `end`, both inclusive; `scores` are those of the anchors, with their gradient.
    """

    anchor: Tensor
    start: Tensor
    end: Tensor
    scores: Tensor


@dataclass(frozen=True)
class SpanSearch:
    """The first N − 1 steps of N-step attention: which k spans of O(t^1/N) keys suit the query at position t − 1.

        anchors of query q      q − ⌊iⁿ⌋ + 1 ≥ 0, i = sw + 1, sw + 2, …       all outside the sliding window
        score                   q1 · key of the anchor, unscaled; the best k are kept
        span                    from anchor − ⌈b t^p⌉ to min(anchor + ⌈f t^p⌉, q − w) if f > 0, else to the anchor

    With N > 2, each kept anchor a is refined N − 2 times before: to the best of a, a − s, a − 2s, … within
    ⌈b t^r⌉ keys, r = (N−1)/N, (N−2)/N, … and s = ⌈t^(r − 1/N)⌉; the scores along the way add up. Every key before the
    window is in some span if b ≥ N = n. See `Superlinear` for the arguments.
    """

    steps: int = 2
    window: int = 1
    topk: int = 2
    power: float | None = None
    backward: float | None = None
    forward: float = 0.0
    span_power: float | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("steps", self.steps, 2), ("window", self.window, 0), ("topk", self.topk, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.power is not None and not self.power >= 1:
            raise ValueError(f"power must be at least 1, got {self.power}")
        if not self.forward >= 0:
            raise ValueError(f"forward must be 0 or more, got {self.forward}")
        if self.backward is not None and not self.backward >= 0:
            raise ValueError(f"backward must be 0 or more, got {self.backward}")
        if self.span_power is not None and not 0 <= self.span_power <= 1:
            raise ValueError(f"span_power must be between 0 and 1, got {self.span_power}")

    @property
    def window_size(self) -> int:
        """How many keys the sliding window holds, the query's own among them."""
        return self._power(self.window + 1) - 1

    def _power(self, i: int) -> int:
        n = self.steps if self.power is None else self.power
        return i ** int(n) if n == int(n) else math.floor(i**n)  # floats only where they must be

    def _length(self, factor: float, t: Tensor, power: float) -> Tensor:
        return (factor * t.double() ** power).ceil().long()

    @property
    def _factor(self) -> float:
        return float(self.steps) if self.backward is None else self.backward

    @property
    def _span_power(self) -> float:
        return 1 / self.steps if self.span_power is None else self.span_power

    def anchors(self, positions: Tensor, last: int) -> Tensor:
        """The anchors `(Nq, m)` of queries at `positions (Nq)`, none beyond `last`; −1 where there are no more."""
        distances: list[int] = []
        i = self.window + 1
        while (distance := self._power(i)) <= last + 1:
            distances.append(distance)
            i += 1
        distances += [last + 2] * (self.topk - len(distances))
        found = positions[:, None] + 1 - torch.tensor(distances, device=positions.device)
        return found.clamp_min(-1)

    def span(self, anchor: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """First and last key of the spans at `anchor (…, Nq, k)`; of one that is −1, what the formula gives."""
        t = positions[:, None] + 1
        start = anchor - self._length(self._factor, t, self._span_power)
        end = anchor
        if self.forward:
            reach = anchor + self._length(self.forward, t, self._span_power)
            # Never into the window, whose keys the softmax holds already.
            end = torch.minimum(reach, positions[:, None] - self.window_size)
        missing = anchor < 0
        return torch.where(missing, start, start.clamp_min(0)), torch.where(missing, anchor, end)

    def width(self, last: int) -> int:
        """As many keys as a span of a query up to position `last` holds, or one more."""
        lengths = (math.ceil(f * (last + 1.0) ** self._span_power) for f in (self._factor, self.forward))
        return 2 + sum(lengths)  # one for the anchor, one for the rounding of the power

    def __call__(self, q: Tensor, k: Tensor, offset: int = 0) -> Spans:
        """The spans for search queries `q (B, H, Nq, D)`, the first at position `offset`, in `k (B, Hkv, Nk, D)`."""
        groups, total = q.shape[1] // k.shape[1], q.shape[2]
        most = len(self.anchors(torch.zeros(1, dtype=torch.long), offset + total - 1)[0])
        held = q.shape[0] * k.shape[1] * most * q.shape[3]
        parts = []
        for first, stop in pieces(total, held):
            positions = torch.arange(offset + first, offset + stop, device=q.device)
            part = q[:, :, first:stop].unflatten(1, (-1, groups))  # (B, Hkv, g, c, D)
            with torch.no_grad():
                anchors = self.anchors(positions, offset + total - 1)
                near = k[:, :, anchors.clamp_min(0)]  # (B, Hkv, c, m, D)
                scores = torch.einsum("bhgcd,bhcmd->bhgcm", part, near).masked_fill(anchors < 0, -math.inf)
                best = scores.topk(self.topk, -1).indices
                path = [anchors.expand(scores.shape).gather(-1, best)]
                for step in range(2, self.steps):
                    path.append(self._refine(part, k, path[-1], positions, step, offset + stop))
            scored = torch.stack([(part.unsqueeze(-2) * gathered(k, a)).sum(-1) for a in path]).sum(0)
            anchor = path[-1]
            scored = scored.masked_fill(anchor < 0, max(MISSING, torch.finfo(q.dtype).min))
            start, end = self.span(anchor, positions)
            parts.append(tuple(t.flatten(1, 2) for t in (anchor, start, end, scored)))
        return Spans(*(torch.cat(each, 2) for each in zip(*parts, strict=True)))

    def _refine(self, q: Tensor, k: Tensor, anchor: Tensor, positions: Tensor, step: int, most: int) -> Tensor:
        """Each anchor `(B, Hkv, g, c, k)` moved to the best of those behind it, a step closer."""
        t, part = positions[:, None] + 1, 1 / self.steps
        stride = self._length(1.0, t, 1 - step * part)
        reach = self._length(self._factor, t, 1 - (step - 1) * part)
        count = 2 + math.ceil(self._factor * most**part)
        back = stride[..., None] * torch.arange(count, device=k.device)
        sites = anchor[..., None] - back  # (B, Hkv, g, c, k, count)
        scores = torch.einsum("bhgcd,bhgckjd->bhgckj", q, gathered(k, sites))
        scores = scores.masked_fill((back > reach[..., None]) | (sites < 0), -math.inf)
        best = sites.gather(-1, scores.argmax(-1, keepdim=True)).squeeze(-1)
        return torch.where(anchor < 0, anchor, best)


def pieces(total: int, held: int) -> Iterator[tuple[int, int]]:
    """`total` queries in runs such that `held` numbers for each are not too many at once."""
    size = max(_HELD // max(held, 1), 16)
    return ((first, min(first + size, total)) for first in range(0, total, size))


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `x (B, Hkv, N, D)` at `index (B, Hkv, …)`: `(B, Hkv, …, D)`; row 0 where the index is negative."""
    flat = index.clamp_min(0).flatten(2)
    return x.gather(2, flat.unsqueeze(-1).expand(*flat.shape, x.shape[-1])).unflatten(2, index.shape[2:])


def span_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans, search: SpanSearch, *, offset: int = 0) -> Tensor:
    """The last step: softmax attention to window and span, for each span alone, mixed by the gate.

        o = Σ_j softmax(scores)_j · attend(q; window ∪ span_j)        q (B, H, Nq, D) → (B, H, Nq, Dv)

    Without any anchor this is the window's attention. Cost O(Nq · k · t^1/N) beside the window's.
    """
    total, groups, scale = q.shape[2], q.shape[1] // k.shape[1], q.shape[3] ** -0.5
    near, near_lse = _window(q, k, v, search.window_size, offset)
    gate = spans.scores.softmax(-1)
    width = search.width(offset + total - 1)
    held = q.shape[0] * q.shape[1] * search.topk * width * (k.shape[3] + v.shape[3])

    def part(first: int, stop: int, q: Tensor, k: Tensor, v: Tensor, near: Tensor, lse: Tensor, gate: Tensor) -> Tensor:
        start, end, anchor = (
            t[:, :, first:stop].unflatten(1, (-1, groups)) for t in (spans.start, spans.end, spans.anchor)
        )
        sites = end[..., None] - torch.arange(width, device=q.device)  # (B, Hkv, g, c, k, w)
        seen = (sites >= start[..., None]) & (anchor[..., None] >= 0)
        mine = (q[:, :, first:stop] * scale).unflatten(1, (-1, groups))
        logits = torch.einsum("bhgcd,bhgckwd->bhgckw", mine, gathered(k, sites))
        logits = logits.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~seen, MISSING)
        far_lse = logits.logsumexp(-1)
        weights = (logits - far_lse[..., None]).exp().to(v.dtype)
        far = torch.einsum("bhgckw,bhgckwd->bhgckd", weights, gathered(v, sites)).flatten(1, 2)
        # Two softmaxes over disjoint keys are joined by their denominators.
        share = torch.sigmoid(far_lse.flatten(1, 2) - lse[:, :, first:stop, None].to(far_lse.dtype))
        share = share.masked_fill(anchor.flatten(1, 2) < 0, 0.0).to(v.dtype) * gate[:, :, first:stop]
        rest = gate[:, :, first:stop].sum(-1, keepdim=True) - share.sum(-1, keepdim=True)
        return (share.unsqueeze(-1) * far).sum(-2) + rest * near[:, :, first:stop]

    runs = list(pieces(total, held))
    # What was gathered is gathered again in the backward pass: it is far larger than what it comes from.
    again = len(runs) > 1 and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    out = [
        checkpoint(part, a, b, q, k, v, near, near_lse, gate, use_reentrant=False)
        if again
        else part(a, b, q, k, v, near, near_lse, gate)
        for a, b in runs
    ]
    return torch.cat(out, 2)


def _window(q: Tensor, k: Tensor, v: Tensor, size: int, offset: int) -> tuple[Tensor, Tensor]:
    """Attention to the `size` latest keys of each query, and its log-sum-exp."""
    total = q.shape[2]
    if not size:
        empty = q.new_zeros(*q.shape[:3], v.shape[3])
        return empty, q.new_full(q.shape[:3], -math.inf)
    first = max(offset - size + 1, 0)  # keys that no query of this piece sees any more are not looked at
    k, v = k[:, :, first : offset + total], v[:, :, first : offset + total]
    pattern: Pattern = Causal() if size >= k.shape[2] else Window(size)
    return attend(q, k, v, pattern=pattern.starting_at(offset - first), return_lse=True)


@register(
    Card(
        name="superlinear",
        title="Superlinear Multi-Step Attention",
        paper="2601.18401",
        system="superlinear",
        family="sparse",
        kind=TOKENS,
        capabilities=CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N^(1 + 1/steps)",
        growth=1.4,  # of the lengths that are counted: the projections are N
        state="2 * kv_heads * head_dim * N",
        sample=dict(heads=4, kv_heads=2),
    )
)
class Superlinear(MultiHead):
    """Causal attention in N steps: search for spans anywhere in the past, then attend to them beside a sliding window.

        y = Wo · Σ_j softmax_j(q1 · key of anchor_j) · attend(q, k, v; window ∪ span_j)        q1 = Wq1 x

    x (B, N, C) → the same. No key is out of reach by construction, and none is looked at without need: with two steps
    a query scores O(√N) anchors and attends to O(√N) keys, O(N^3/2) in all; with `steps` it is O(N^(1 + 1/steps)). The
    choice passes no gradient: the search learns through the gate alone. Where the window holds everything this is
    causal attention. Source: arXiv 2601.18401 (concavity-ai/superlinear), which builds two steps; what more steps do is
    our reading of it (see `SpanSearch`).

    Args:
        steps: N.
        window: sw, the sliding window in anchors: ⌊(sw + 1)ⁿ⌋ − 1 keys.
        topk: k, how many spans.
        power: n; `steps` if None. Smaller is denser: 1/0.55 is the released upscaling's.
        backward, forward: b and f, how far spans reach behind and past their anchors; b is `steps` if None.
        span_power: p; 1/steps if None.
        Others as for `MultiHead`; a position turns q1 as it turns q.
    """

    causal_only = "its anchors lie in the past"

    def __init__(
        self,
        dim: int,
        *,
        steps: int = 2,
        window: int = 1,
        topk: int = 2,
        power: float | None = None,
        backward: float | None = None,
        forward: float = 0.0,
        span_power: float | None = None,
        causal: bool = True,
        **keywords: Any,
    ) -> None:
        if keywords.get("dropout"):
            raise ValueError(f"dropout must be 0, got {keywords['dropout']}: weights are joined span by span")
        super().__init__(dim, causal=causal, **keywords)
        self.search = SpanSearch(steps, window, topk, power, backward, forward, span_power)
        self.wq1 = nn.Linear(dim, self.heads * self.head_dim, bias=self.wqkv.bias is not None)

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        x: Tensor,
        pattern: Pattern | None = None,
        offset: int = 0,
        state: KVCache | None = None,
    ) -> Tensor:
        if self.position_bias(q, k, offset) is not None:
            raise ValueError(f"position must turn queries and keys, got {type(self.position).__name__}, a bias")
        q1 = self.q_norm(split_heads(self.wq1(x), self.heads))
        if self.position is not None:
            q1, _ = self.position(q1, q1, offset)
        return span_attention(q, k, v, self.search(q1, k, offset), self.search, offset=offset)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: KVCache | None = None,
    ) -> Any:
        self.refuse(context=context, pattern=pattern, grid=grid)
        return super().forward(x, state=state)
