"""Proxy attention: a trained causal model reads a long prompt by the blocks that an averaged head points at."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnlab.attend import attend
from attnlab.cards import ANY_LENGTH, TOKENS, Card, register
from attnlab.nn.cache import KVCache
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern
from attnlab.routing import ProxyHeads


@register(
    Card(
        name="proxy_attention",
        title="ProxyAttn: Guided Sparse Attention via Representative Heads",
        paper="2509.24745",
        system="proxyattn",
        family="sparse",
        kind=TOKENS,
        capabilities=ANY_LENGTH,
        cost="N · chosen keys + N²/(stride² · heads)",
        sample=dict(heads=4, kv_heads=2, block=4, stride=2, minimum=4),
    )
)
class ProxyAttention(MultiHead):
    """Causal attention of trained heads to the blocks of keys that a few averaged heads rank: nothing is trained.

        y = Wo · attend(q, k, v; route=ProxyHeads(γ, …))        see `attnlab.routing.ProxyHeads`

    x (B, N, C) → the same. Its parameters are `MultiHead`'s: put it in the place of one in a trained model. Heads look
    at much the same tokens, but at more or fewer of them: one ranking, from averages of turned queries and keys, serves
    all heads of a group, and each head's own budget comes from what its last queries look at. γ = 1 is causal
    attention, and so is any text of up to `minimum` tokens.

    A prompt is read sparsely; with a state, what is read after the first piece sees every key so far, as in the paper's
    decoding. No token reads a later one, but later tokens have an influence on which blocks are read (budgets are those
    of the last queries, ranks those of all queries in a block), so the card claims neither causality nor streaming.
    Cost per head: 4 N · (chosen keys) · D, and of dense attention 1/(2 · stride² · H) for the ranks and 1/N_blocks for
    budgets. Source: arXiv 2509.24745.

    Args:
        gamma: γ, the share of its attention that a head keeps: 0.95 or 0.9 in the paper.
        block: 128 or 64 tokens.
        groups: averaged heads, a divisor of `kv_heads`: 1 for Llama-3.1-8B, 4 for Qwen2.5-7B.
        stride, minimum, diagonal, first: of `ProxyHeads`.
        Others as for `MultiHead`; a position must turn q and k.
    """

    causal_only = "its blocks are ranked among those of the past"

    def __init__(
        self,
        dim: int,
        *,
        gamma: float = 0.95,
        block: int = 128,
        groups: int = 1,
        stride: int | tuple[int, int] = 4,
        minimum: int = 2048,
        diagonal: bool = True,
        first: bool = True,
        causal: bool = True,
        **keywords: Any,
    ) -> None:
        super().__init__(dim, causal=causal, **keywords)
        self.route = ProxyHeads(
            gamma, block, groups=groups, stride=stride, minimum=minimum, diagonal=diagonal, first=first
        )
        if self.kv_heads % groups:
            raise ValueError(f"groups must divide kv_heads = {self.kv_heads}, got {groups}")

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
        if offset or self.route.sees_all(q.shape[2]):
            return super().mix(q, k, v, x=x, pattern=pattern, offset=offset, state=state)
        return attend(q, k, v, pattern=pattern, route=self.route, dropout=self.dropout if self.training else 0.0)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: KVCache | None = None,
    ) -> Any:
        self.refuse(context=context, grid=grid)
        return super().forward(x, pattern=pattern, state=state)
