"""Transformer-LS: a window and learned summaries of everything else, under one softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnlab.attend import attend, merge
from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, NONCAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import KVCache, Owner, RollingCache
from attnlab.nn.mechanism import check_keep, check_turns, join_heads, split_heads
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Explicit, Halo, Pattern, Window


@dataclass(frozen=True)
class Finished(Pattern):
    """Of `rank` keys for each chunk of tokens, a query sees those of the chunks before its own."""

    chunk: int
    rank: int

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k // self.rank < q // self.chunk


class Recent(NamedTuple):
    """The window's keys and values, all summaries so far, and the tokens of the chunk that is not finished."""

    near: RollingCache
    far: KVCache
    pending: tuple[Tensor, ...]  # logits (B, H, n, r), keys and values (B, H, n, D)
    owner: Owner


@register(
    Card(
        name="transformer_ls",
        title="Long-Short Transformer: Efficient Transformers for Language and Vision",
        paper="2107.02192",
        family="sparse",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N (w + r)",
        growth=1.0,
        state="2 * dim * (window + summaries * (N // chunk) + N % chunk) + heads * summaries * (N % chunk)",
        sample=dict(heads=4, window=16, summaries=4, chunk=8),
    )
)
class WindowAndSummaries(MultiHead):
    """Softmax attention to what is near, and to r learned averages of what there is.

        k = LN₁(Wk x),  v = LN₁(Wv x),  P = softmax_N(Wp x)ᵀ                  P (r, N) for each head
        k̄ = LN₂(P k),  v̄ = LN₂(P v)                                          the summaries, (r, D) for each head
        y = Wo · softmax([q k̄ᵀ, q k_nearᵀ]/√D) [v̄; v_near]                   one softmax over both

    x (B, N, C) → (B, N, C). Both norms run over all heads' channels: without the second, averages would be so much
    smaller than tokens that no query would look at them. Near are the tokens of the query's own block of `window` and
    half as many on each side: 2·window in all. Causal, near are the last `window` tokens, and each `chunk` has r
    summaries of its own, which are seen from the next chunk on; a state holds the window and all summaries. Cost
    O(N (2w + r)), causal O(N (w + r N/l)). Source: arXiv 2107.02192 (NVIDIA/transformer-ls; Shark-NLP/CAB). The
    authors' causal form also adds relative positions, and chunks of nothing before the text; here `position` is for the
    caller to choose.

    Args:
        window, summaries, chunk: w, r and l; where causal, w ≥ l, or there would be tokens that no query sees.
        Others as for `MultiHead`; positions that turn q and k, not biases.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 16,
        summaries: int = 16,
        chunk: int = 16,
        bias: bool = True,
        causal: bool = False,
        position: Any = None,
    ) -> None:
        check_turns(position)
        super().__init__(dim, heads=heads, bias=bias, causal=causal, position=position)
        for name, value in (("window", window), ("summaries", summaries), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if causal and window < chunk:
            raise ValueError(f"window must be at least chunk = {chunk} with causal=True, got {window}")
        self.window, self.summaries, self.chunk = window, summaries, chunk
        self.wp = nn.Linear(dim, heads * summaries)
        self.near_norm, self.far_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def initial_state(  # type: ignore[override]
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Recent:
        if not self.causal:
            raise ValueError("streaming needs causal=True")
        owner, weight = self.owner(batch), self.wp.weight
        pending = [
            torch.zeros(batch, self.heads, 0, width, device=device or weight.device, dtype=dtype or weight.dtype)
            for width in (self.summaries, self.head_dim, self.head_dim)
        ]
        return Recent(RollingCache(self.window, 0, owner), KVCache(owner=owner), tuple(pending), owner)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Any = None,
        state: Any = None,
        keep: Tensor | None = None,
    ) -> Any:
        """As every mechanism; `keep` (B, N) is False where a token is padding, which sees nothing and is not seen."""
        self.check(x)
        self.refuse(context=context, pattern=pattern, keep=keep if state is not None else None)
        if state is not None:
            if not self.causal:
                raise ValueError("streaming needs causal=True")
            self.check_state(state, Recent, len(x))
        tokens, offset, gone = x.shape[1], 0 if state is None else state.near.length, 0
        q, k, v = self.qkv(x)
        k, v = (split_heads(self.near_norm(join_heads(t)), self.heads) for t in (k, v))
        logits = split_heads(self.wp(x), self.heads)
        near: Pattern = Window(self.window) if self.causal else Halo((tokens,), self.window, max(self.window // 2, 1))
        if keep is not None:
            logits = logits.masked_fill(~check_keep(keep, k), torch.finfo(logits.dtype).min)
            near = near & Explicit(keep[:, None, None, :].expand(-1, 1, tokens, -1))
        pending: tuple[Tensor, ...] = (logits, k, v)
        if state is not None:
            pending = tuple(torch.cat(both, 2) for both in zip(state.pending, pending, strict=True))
        far_k, far_v = self.summarise(*pending)
        far: Pattern | None = None
        # Summaries have no place of their own: queries turn for tokens alone.
        turned, k = (q, k) if self.position is None else self.position(q, k, offset)
        if state is not None:
            k, v, gone = state.near.extend(k, v)
            far_k, far_v = state.far.append(far_k, far_v)
            done = pending[0].shape[2] // self.chunk * self.chunk
            state = state._replace(pending=tuple(t[:, :, done:] for t in pending))
        if self.causal:
            near, far = near.starting_at(offset - gone), Finished(self.chunk, self.summaries).starting_at(offset)
        parts = [attend(turned, k, v, pattern=near, return_lse=True)]
        if far_k.shape[2]:
            parts.append(attend(q, far_k, far_v, pattern=far, return_lse=True))
        heads = merge(parts)[0]
        y = self.merge(heads if keep is None else heads * check_keep(keep, heads))
        return y if state is None else (y, state)

    def summarise(self, logits: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Summaries of keys and values: (B, H, r, D), or of each whole chunk (B, H, r·chunks, D)."""
        if self.causal:
            whole = k.shape[2] // self.chunk
            shape = (whole, self.chunk)
            logits, k, v = (t[:, :, : whole * self.chunk].unflatten(2, shape) for t in (logits, k, v))
        shares = logits.softmax(-2).mT
        made = [shares @ t for t in (k, v)]
        flat = [t.flatten(2, 3) if self.causal else t for t in made]
        far_k, far_v = (split_heads(self.far_norm(join_heads(t)), self.heads) for t in flat)
        return far_k, far_v
