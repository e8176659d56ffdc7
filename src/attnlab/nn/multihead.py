"""Multi-head attention with grouped queries: the softmax baseline, and the base of its relatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import ALL_FOUR, ANY_LENGTH, EXACT, PERMUTATION_EQUIVARIANT, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import KVCache
from attnlab.nn.mechanism import Mechanism, check_heads, join_heads, pattern_for, split_heads
from attnlab.patterns import Pattern


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
        position: called as `position(q, k, offset) -> (q, k)` on heads (a rotary embedding, say).
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
        position: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None,
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

    def project(self, x: Tensor, context: Tensor | None = None, offset: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q `(B, H, N, D)` of `x`, and k, v `(B, Hkv, M, D)` of `context` (or of `x`), normed and positioned.

        `offset` is the position of x's first token in the sequence.
        """
        widths = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        if context is None:
            q, k, v = self.wqkv(x).split(widths, -1)
        else:
            (wq, wkv), (bq, bkv) = self._parts(widths)
            q = nn.functional.linear(x, wq, bq)
            k, v = nn.functional.linear(context, wkv, bkv).chunk(2, -1)
        q, k = self.q_norm(split_heads(q, self.heads)), self.k_norm(split_heads(k, self.kv_heads))
        if self.position is not None:
            q, k = self.position(q, k, offset)
        return q, k, split_heads(v, self.kv_heads)

    def _parts(self, widths: list[int]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
        cut = widths[0]
        weight, bias = self.wqkv.weight, self.wqkv.bias
        return (weight[:cut], weight[cut:]), ((None, None) if bias is None else (bias[:cut], bias[cut:]))

    def merge(self, heads: Tensor) -> Tensor:
        """`(B, H, N, D)` through the output projection to `(B, N, C)`."""
        return self.wo(join_heads(heads))

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache. Its size is 2·Hkv·D numbers per token."""
        if not self.causal:
            raise ValueError("streaming needs causal=True")
        return KVCache()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | None) -> Tensor:
        """Heads from q, k, v: the line in which relatives differ."""
        return attend(q, k, v, pattern=pattern, dropout=self.dropout if self.training else 0.0)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: KVCache | None = None,
    ) -> Any:
        """`(B, N, C)` → `(B, N, C)`, or `(y, state)` with a state. `grid` is not used."""
        self.check(x, context)
        offset = 0
        if state is not None:
            self.refuse(context=context)
            offset = state.length
        q, k, v = self.project(x, context, offset)
        if state is not None:
            k, v = state.append(k, v)
        y = self.merge(self.mix(q, k, v, pattern_for(self.causal, pattern, offset)))
        return y if state is None else (y, state)
