"""Multi-head latent attention without positions: keys and values come from one small latent per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import ALL_FOUR, ANY_LENGTH, PERMUTATION_EQUIVARIANT, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import KVCache
from attnlab.nn.mechanism import Mechanism, join_heads, pattern_for, split_heads
from attnlab.patterns import Pattern


@register(
    Card(
        name="nope_mla",
        title="Kimi Linear: its full-attention layer, multi-head latent attention without positions",
        paper="2510.26692",
        system="kda",
        family="softmax",
        kind=TOKENS,
        capabilities=ALL_FOUR | STREAMING | ANY_LENGTH | PERMUTATION_EQUIVARIANT,
        cost="N²",
        growth=2.0,
        state="(rank + shared_dim) * N",
        sample=dict(heads=4, rank=16, head_dim=8, shared_dim=4, value_dim=8),
    )
)
class LatentAttention(Mechanism):
    """Softmax attention whose keys and values are read out of a latent of `rank` numbers per token.

        c, s = Wdown x        c ← RMSNorm(c)        k_h, v_h = Wup_h c        q_h, r_h = Wq_h x
        y = Wo · softmax((q_h·k_h + r_h·s) / √(D + shared)) v_h

    s is one key part that all heads share (in models with rotary positions the part that is turned; here it is not).
    x `(B, N, C)` → `(B, N, C)`; O(N²) time. The cache holds c and s: rank + shared numbers per token for all heads.
    Continuing from a cache, Wup is absorbed into the query and the output, so that old keys are never expanded.
    Sources: arXiv 2510.26692; the latent is from 2405.04434.

    Args:
        dim: C.
        heads, head_dim, value_dim: H, D and the width of v (128 each in Kimi Linear's 32 heads).
        shared_dim: width of s; 0 for none.
        rank: width of c.
        causal: each token sees itself and those before it.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int = 128,
        shared_dim: int = 64,
        value_dim: int = 128,
        rank: int = 512,
        causal: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(dim, causal=causal)
        for name, value in (("heads", heads), ("head_dim", head_dim), ("value_dim", value_dim), ("rank", rank)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.heads, self.head_dim, self.shared_dim, self.value_dim, self.rank = (
            heads, head_dim, shared_dim, value_dim, rank,
        )  # fmt: skip
        self.wq = nn.Linear(dim, heads * (head_dim + shared_dim), bias=False)
        self.wdown = nn.Linear(dim, rank + shared_dim, bias=False)
        self.norm = nn.RMSNorm(rank, eps=norm_eps)
        self.wup = nn.Linear(rank, heads * (head_dim + value_dim), bias=False)
        self.wo = nn.Linear(heads * value_dim, dim, bias=False)

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache, of rank + shared_dim numbers per token."""
        if not self.causal:
            raise ValueError("streaming needs causal=True")
        return KVCache(owner=self.owner(batch))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: KVCache | None = None,
    ) -> Any:
        self.check(x, context)
        q = split_heads(self.wq(x), self.heads)
        latent, shared = self.wdown(x if context is None else context).split([self.rank, self.shared_dim], -1)
        latent, shared, offset = self.norm(latent).unsqueeze(1), shared.unsqueeze(1), 0
        if state is not None:
            self.refuse(context=context)
            self.check_state(state, KVCache, len(x))
            offset = state.length
            shared, latent = state.append(shared, latent)
        where = pattern_for(self.causal, pattern, offset, x.shape[1])
        mix = self._expanded if offset == 0 else self._absorbed
        y = self.wo(join_heads(mix(q, latent, shared, where)))
        return y if state is None else (y, state)

    def _expanded(self, q: Tensor, latent: Tensor, shared: Tensor, pattern: Pattern | None) -> Tensor:
        k, v = split_heads(self.wup(latent[:, 0]), self.heads).split([self.head_dim, self.value_dim], -1)
        k = torch.cat([k, shared.expand(-1, self.heads, -1, -1)], -1)
        return attend(q, k, v, pattern=pattern, scale=q.shape[-1] ** -0.5)

    def _absorbed(self, q: Tensor, latent: Tensor, shared: Tensor, pattern: Pattern | None) -> Tensor:
        """All heads read one key, c and s: q·(Wk c) = (Wkᵀ q)·c, and Σ a (Wv c) = Wv (Σ a c)."""
        up = self.wup.weight.view(self.heads, self.head_dim + self.value_dim, self.rank)
        for_keys, for_values = up.split([self.head_dim, self.value_dim], 1)
        own, common = q.split([self.head_dim, self.shared_dim], -1)
        reader = torch.cat([own @ for_keys, common], -1)
        read = attend(reader, torch.cat([latent, shared], -1), latent, pattern=pattern, scale=q.shape[-1] ** -0.5)
        return read @ for_values.mT
