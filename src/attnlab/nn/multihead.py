"""Multi-head attention with grouped queries: the softmax baseline, and the base of its relatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import ALL_FOUR, ANY_LENGTH, EXACT, PERMUTATION_EQUIVARIANT, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import KVCache
from attnlab.nn.decode import attend_one, visible
from attnlab.nn.fused import linear, product
from attnlab.nn.mechanism import Mechanism, check_heads, join_heads, pattern_for, split_heads
from attnlab.patterns import Pattern
from attnlab.positions import Position
from attnlab.problem import Bias


@register(
    Card(
        name="multihead",
        title="Attention Is All You Need, with grouped queries (GQA)",
        paper="1706.03762",
        family="softmax",
        kind=TOKENS,
        capabilities=ALL_FOUR | STREAMING | ANY_LENGTH | PERMUTATION_EQUIVARIANT | EXACT,
        cost="N²",
        growth=2.0,
        state="2 * kv_heads * head_dim * N",
        sample=dict(heads=4, kv_heads=2),
        limit=lambda dim, grid: MultiHead(dim, heads=4),
    )
)
class MultiHead(Mechanism):
    """Softmax attention of H query heads over Hkv key-value heads.

        y = Wo · attend(q, k, v)        q = Wq x, (k, v) = Wkv context (x itself in self-attention)

    x `(B, N, C)` → `(B, N, C)`; cost O(N²) time, O(N) memory. Sources: arXiv 1706.03762; grouped queries 2305.13245.

    Args:
        dim: C.
        heads, kv_heads, head_dim: H; Hkv, which divides H (H if None); D (C/H if None).
        bias: biases in both projections; out_bias: in the output projection, where that differs.
        causal: each token sees itself and those before it.
        position: from `attnlab.positions` (`Rotary`, `ALiBi`, …), or called as `position(q, k, offset) -> (q, k)`.
        qk_norm: builds a norm from a width, for q and for k per head (`nn.RMSNorm`, say).
        dropout: of the weights, while training.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        causal: bool = False,
        position: Position | Callable[..., tuple[Tensor, Tensor]] | None = None,
        qk_norm: Callable[[int], nn.Module] | None = None,
        dropout: float = 0.0,
        out_bias: bool | None = None,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads = heads
        self.kv_heads, self.head_dim = check_heads(dim, heads, kv_heads, head_dim)
        self.wqkv = nn.Linear(dim, (heads + 2 * self.kv_heads) * self.head_dim, bias=bias)
        self.wo = nn.Linear(heads * self.head_dim, dim, bias=bias if out_bias is None else out_bias)
        self.position = position
        self.q_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.dropout = dropout

    @property
    def on_grid(self) -> bool:
        """Whether the position wants the grid on which the tokens lie."""
        return getattr(self.position, "on_grid", False)

    def qkv(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The projections alone: q `(B, H, N, D)` of `x`, k and v `(B, Hkv, M, D)` of `context` (or of `x`)."""
        widths = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        if context is None:
            q, k, v = linear(x, self.wqkv).split(widths, -1)
        else:
            cut, bias = widths[0], self.wqkv.bias
            q = product(x, self.wqkv.weight[:cut], None if bias is None else bias[:cut])
            k, v = product(context, self.wqkv.weight[cut:], None if bias is None else bias[cut:]).chunk(2, -1)
        return split_heads(q, self.heads), split_heads(k, self.kv_heads), split_heads(v, self.kv_heads)

    def project(
        self, x: Tensor, context: Tensor | None = None, offset: int = 0, *, grid: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`qkv`, with q and k normed and turned to their positions; `offset` is that of x's first token."""
        q, k, v = self.qkv(x, context)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.position is not None:
            q, k = self.position(q, k, offset) if grid is None else self.position(q, k, offset, grid=grid)
        return q, k, v

    def position_bias(self, q: Tensor, k: Tensor, offset: int = 0) -> Bias | None:
        """What the position adds to the scores, if it does."""
        bias = self.position.bias(q.shape[2], k.shape[2], offset) if isinstance(self.position, Position) else None
        return bias.to(q.dtype) if isinstance(bias, Tensor) else bias

    def merge(self, heads: Tensor) -> Tensor:
        """`(B, H, N, D)` through the output projection to `(B, N, C)`."""
        return linear(join_heads(heads), self.wo)

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache. Its size is 2·Hkv·D numbers per token."""
        if not self.causal:
            raise ValueError("streaming needs causal=True")
        return KVCache(owner=self.owner(batch))

    def where(self, given: Pattern | None, offset: int, queries: int) -> Pattern | None:
        """Where the queries of one call look: what the caller gave, and what this mechanism is about."""
        return pattern_for(self.causal, given, offset, queries)

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
        """Heads `(B, H, N, D)` from q, k, v: the line in which relatives differ.

        `x` are the queries' tokens, the first of them at position `offset`, as `pattern` knows; k and v are from 0 on.
        """
        dropout, bias = self.dropout if self.training else 0.0, self.position_bias(q, k, offset)
        if state is None or q.shape[2] > 1 or (pattern is not None and (pattern.per_head or pattern.per_batch)):
            return attend(q, k, v, pattern=pattern, bias=bias, dropout=dropout)
        # A decoding step is over before a planner has thought about its length, which it never saw before.
        at = None
        if pattern is not None:
            at = visible(pattern, k.shape[2], k.device)
            if not len(at):
                return torch.zeros_like(q[..., :1]) * v[:, :1, :1]
            k, v = k[:, :, at], v[:, :, at]
        return attend_one([(q, k, v)], bias=bias, at=at, dropout=dropout)

    def after(self, heads: Tensor, x: Tensor) -> Tensor:
        """What becomes of the heads `(B, H, N, D)` before they are merged: nothing."""
        return heads

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: KVCache | None = None,
    ) -> Any:
        """`(B, N, C)` → `(B, N, C)`, or `(y, state)` with a state. `grid` is for positions that want one."""
        self.check(x, context)
        offset = 0
        if state is not None:
            self.refuse(context=context)
            self.check_state(state, KVCache, len(x))
            offset = state.length
        where = self.where(pattern, offset, x.shape[1])
        q, k, v = self.project(x, context, offset, grid=grid if self.on_grid else None)
        if state is not None:
            k, v = state.append(k, v)
        y = self.merge(self.after(self.mix(q, k, v, x=x, pattern=where, offset=offset, state=state), x))
        return y if state is None else (y, state)

    def weights(self, x: Tensor, context: Tensor | None = None, **keywords: Any) -> Tensor:
        """The weights `(B, H, N, M)` with which `forward(x, context, **keywords)` mixes values: to look at, small N."""
        q, k, _ = self.project(x, context, grid=keywords.pop("grid", None) if self.on_grid else None)
        pattern = self.where(keywords.pop("pattern", None), 0, x.shape[1])
        self.refuse(**keywords)
        # The unit vectors as values: what comes out is what each value would have been weighted by.
        units = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
        return self.mix(q, k, units, x=x, pattern=pattern)
