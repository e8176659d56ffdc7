"""Heads of two kinds: most see a window, a few see everything."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, EXACT, NONCAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import Cache, KVCache, Owner, RollingCache
from attnlab.nn.decode import attend_one
from attnlab.nn.mechanism import pattern_for
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern, Window
from attnlab.positions import Position


class Runs(NamedTuple):
    """What is kept for each run of heads that look alike."""

    caches: tuple[Cache, ...]
    owner: Owner


@register(
    Card(
        name="long_short",
        title="Short-Range Dependency Effects on Transformer Instability and a Decomposed Attention Solution",
        paper="2505.15548",
        system="ls_attention",
        family="softmax",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | CAUSAL_SELF | STREAMING | ANY_LENGTH | EXACT,
        cost="N² in the global heads, N l in the local ones",
        growth=2.0,
        state="2 * head_dim * (global_keys * N + sum(spans))",
        sample=dict(heads=4, span=8),
        limit=lambda dim, grid: LongShortAttention(dim, heads=4, span=2**20),
    )
)
class LongShortAttention(MultiHead):
    """Softmax attention whose local heads see `span` tokens, and whose few global heads see all.

        head h:  softmax(q kᵀ/√d + M_h) v        M_h = 0 where 0 ≤ i − j < span (local), j ≤ i (global), else −∞
        y = Wo · concat(local heads, global heads)

    x (B, N, C) → (B, N, C), with exactly the parameters of `MultiHead`. The paper's argument: a pattern as narrow as
    "the last few tokens" has a rank near N, which q·kᵀ of rank d can only imitate with ever larger logits; a window
    gives it for nothing, so logits stay small and training stable. On such a pattern alone that is so (2 to 5 times
    smaller, and learnt sooner); on text at a high learning rate they grew no less than full attention's
    (benchmarks/long_short.py). Decoding keeps N keys for the global heads and `span` for each local one.
    Source: arXiv 2505.15548 (no code was published: 1 global head of 12 and a span of 100 are its experiments').

    Args:
        global_heads: how many heads see everything.
        span: keys of a local head, itself included (and as many ahead if not causal).
        spans: one per local head, in place of `span`.
        order: which heads come first in `wo`: "local_first" or "global_first".
        shared_global_kv: the global heads share one key and value head.
        Others as for `MultiHead`; positions that turn q and k, not biases.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 12,
        global_heads: int = 1,
        span: int = 100,
        spans: Sequence[int] | None = None,
        order: Literal["local_first", "global_first"] = "local_first",
        shared_global_kv: bool = False,
        **keywords: Any,
    ) -> None:
        super().__init__(dim, heads=heads, **keywords)
        if self.kv_heads != heads:
            raise ValueError(f"kv_heads must be heads = {heads}: each local head has its own, got {self.kv_heads}")
        if not 0 <= global_heads <= heads:
            raise ValueError(f"global_heads must lie in 0 to heads = {heads}, got {global_heads}")
        if order not in ("local_first", "global_first"):
            raise ValueError(f"order must be 'local_first' or 'global_first', got {order!r}")
        if isinstance(self.position, Position) and type(self.position).bias is not Position.bias:
            raise ValueError(f"position must turn q and k, not add a bias, got {type(self.position).__name__}")
        local = heads - global_heads
        wide = list(spans) if spans is not None else [span] * local
        if len(wide) != local or any(n < 1 for n in wide):
            raise ValueError(f"spans must be {local} numbers of at least 1, one per local head, got {wide}")
        self.spans, self.order = tuple(wide), order
        self.global_heads, self.shared = global_heads, shared_global_kv and global_heads > 1
        if self.shared:
            self.kv_heads = local + 1
            width = (heads + 2 * self.kv_heads) * self.head_dim
            self.wqkv = nn.Linear(dim, width, bias=self.wqkv.bias is not None)

    @property
    def global_keys(self) -> int:
        """Key and value heads of the global heads."""
        return 1 if self.shared else self.global_heads

    @property
    def groups(self) -> list[tuple[slice, slice, int | None]]:
        """(query heads, key heads, span or None) of the runs of heads that look alike."""
        kinds: list[int | None] = [*self.spans]
        everywhere: list[int | None] = [None] * self.global_heads
        kinds = kinds + everywhere if self.order == "local_first" else everywhere + kinds
        found, at, key = [], 0, 0
        for span, run in groupby(kinds):
            n = len(list(run))
            keys = 1 if span is None and self.shared else n
            found.append((slice(at, at + n), slice(key, key + keys), span))
            at, key = at + n, key + keys
        return found

    def initial_state(  # type: ignore[override]
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Runs:
        """A cache for each run of heads: of `span` tokens, or of all."""
        super().initial_state(batch, device=device, dtype=dtype)
        owner = self.owner(batch)
        caches = (KVCache(owner=owner) if span is None else RollingCache(span, 0, owner) for *_, span in self.groups)
        return Runs(tuple(caches), owner)

    def look(
        self, q: Tensor, k: Tensor, v: Tensor, span: int | None, given: Pattern | None, cache: Cache | None
    ) -> Tensor:
        """One run of heads."""
        own = None if span is None else Window(span, causal=self.causal)
        offset, n = 0 if cache is None else cache.length, q.shape[2]
        if isinstance(cache, RollingCache):
            if n == 1:
                return attend_one([(q, *cache.step(k, v))])
            k, v, gone = cache.extend(k, v)
            offset -= gone
        elif cache is not None:
            k, v = cast(KVCache, cache).append(k, v)
        where = pattern_for(self.causal, given, offset, n, own=own)
        return attend(q, k, v, pattern=where, dropout=self.dropout if self.training else 0.0)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: Any = None,
    ) -> Any:
        self.check(x)
        self.refuse(context=context, pattern=pattern if state is not None else None)
        caches: tuple[Cache | None, ...] = (None,) * len(self.groups)
        if state is not None:
            self.check_state(state, Runs, len(x))
            caches = state.caches
        q, k, v = self.project(x, None, 0 if caches[0] is None else caches[0].length)
        heads = [
            self.look(q[:, h], k[:, s], v[:, s], span, pattern, cache)
            for (h, s, span), cache in zip(self.groups, caches, strict=True)
        ]
        y = self.merge(torch.cat(heads, 1))
        return y if state is None else (y, state)
