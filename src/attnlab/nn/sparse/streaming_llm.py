"""A sliding window with sinks: the last tokens and the first few, in bounded memory."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from attnlab.attend import attend, merge
from attnlab.cards import ALL_FOUR, ANY_LENGTH, EXACT, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import RollingCache
from attnlab.nn.decode import attend_one
from attnlab.nn.mechanism import pattern_for
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Causal, Pattern, Sinks, Window
from attnlab.positions import Rotary
from attnlab.problem import Bias


@register(
    Card(
        name="sliding_window",
        title="Efficient Streaming Language Models with Attention Sinks",
        paper="2309.17453",
        family="sparse",
        kind=TOKENS,
        capabilities=ALL_FOUR | STREAMING | ANY_LENGTH | EXACT,
        cost="N (w + s)",
        growth=1.0,
        state="2 * kv_heads * head_dim * (window + sinks)",
        sample=dict(heads=4, kv_heads=2, window=16, sinks=2),
        limit=lambda dim, grid: SlidingWindow(dim, heads=4, window=2**20),
    )
)
class SlidingWindow(MultiHead):
    """Softmax attention to the last `window` tokens and to the first `sinks`, at a constant price per token.

        query i sees key j  ⟺  0 ≤ i − j < w  or  j < s          (not causal: |i − j| < w or j < s)

    x (B, N, C) → (B, N, C). Models put much of their attention on the first tokens; a window alone drops them and falls
    apart, and four sinks mend it. Decoding keeps w + s keys and values however long the text. Information travels w − 1
    tokens per layer. With w ≥ N it is `MultiHead`. Source: arXiv 2309.17453 (StreamingLLM).

    Args:
        window, sinks: w and s; sinks may be 0.
        places: where sinks stand for a `Rotary` position: in the "text", or in the "cache", right before the window, as
            StreamingLLM has it: then no distance ever exceeds w + s − 1, whatever the model was trained on.
        Others as for `MultiHead`.
    """

    def __init__(
        self,
        dim: int,
        *,
        window: int = 512,
        sinks: int = 4,
        places: Literal["text", "cache"] = "text",
        **keywords: Any,
    ) -> None:
        super().__init__(dim, **keywords)
        if sinks < 0:
            raise ValueError(f"sinks must be 0 or more, got {sinks}")
        if places not in ("text", "cache"):
            raise ValueError(f"places must be 'text' or 'cache', got {places!r}")
        if places == "cache" and not (self.causal and isinstance(self.position, Rotary)):
            raise ValueError("places='cache' needs causal=True and a Rotary position")
        self.window, self.sinks, self.places = window, sinks, places
        self.pattern: Pattern = Window(window, causal=self.causal)
        if sinks:
            self.pattern = self.pattern | (Sinks(sinks) & Causal() if self.causal else Sinks(sinks))

    def where(self, given: Pattern | None, offset: int, queries: int) -> Pattern | None:
        return pattern_for(self.causal, given, offset, own=self.pattern)

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """A cache of exactly sinks + window tokens."""
        super().initial_state(batch, device=device, dtype=dtype)
        return RollingCache(self.window, self.sinks, self.owner(batch))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: Any = None,
    ) -> Any:
        self.check(x, context)
        if state is not None:
            self.refuse(context=context, pattern=pattern)
            self.check_state(state, RollingCache, len(x))
        n, offset, gap = x.shape[1], 0 if state is None else state.length, 0
        relocated = self.places == "cache" and self.sinks > 0 and offset + n > self.window + self.sinks
        if state is None and not relocated:
            return super().forward(x, context, grid=grid, pattern=pattern)
        still, k, v = self.qkv(x, context)
        still, k = self.q_norm(still), self.k_norm(k)
        q, k = (still, k) if self.position is None else self.position(still, k, offset)
        if state is None:
            where = self.where(pattern, 0, n)
        elif n == 1:
            k, v = state.step(k, v)
            where = None  # the cache holds nothing but what this token sees
        else:
            k, v, gap = state.extend(k, v)
            where = self.where(None, offset - gap, n)
        if relocated:
            heads = self.relocate(q, still, k, v, where, offset)
        else:
            bias, at = self.position_bias(q, x.new_empty(0, 0, offset + n), offset), None
            if bias is not None and state is not None:
                index = torch.arange(k.shape[2], device=k.device)
                at = state.positions() if n == 1 else index + gap * (index >= self.sinks)
            dropout = self.dropout if self.training else 0.0
            if where is None:
                heads = attend_one([(q, k, v)], bias=bias, at=at, dropout=dropout)
            else:
                heads = attend(q, k, v, pattern=where, bias=moved(bias, at), dropout=dropout)
        y = self.merge(heads)
        return y if state is None else (y, state)

    def weights(self, x: Tensor, context: Tensor | None = None, **keywords: Any) -> Tensor:
        if self.places == "text" or not self.sinks or x.shape[1] <= self.window + self.sinks:
            return super().weights(x, context, **keywords)
        self.refuse(**{name: given for name, given in keywords.items() if name != "pattern"})
        still, k, _ = self.qkv(x, context)
        q, k = self.position(self.q_norm(still), self.k_norm(k), 0)  # type: ignore[misc]
        units = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
        where = self.where(keywords.get("pattern"), 0, x.shape[1])
        return self.relocate(q, self.q_norm(still), k, units, where, 0)

    def relocate(self, q: Tensor, still: Tensor, k: Tensor, v: Tensor, where: Pattern | None, offset: int) -> Tensor:
        """Heads with the sinks right before the window: for them the queries, `still` unturned, turn less far."""
        dropout = self.dropout if self.training else 0.0
        places = torch.arange(offset, offset + q.shape[2], device=q.device).clamp_max(self.window + self.sinks - 1)
        near = self.position.turn_to(still, places)  # type: ignore[union-attr, operator]
        if where is None:
            parts = [
                (near, k[:, :, : self.sinks], v[:, :, : self.sinks]),
                (q, k[:, :, self.sinks :], v[:, :, self.sinks :]),
            ]
            return attend_one(parts, dropout=dropout)
        first = Sinks(self.sinks)
        return merge(
            [
                attend(near, k, v, pattern=where & first, dropout=dropout, return_lse=True),
                attend(q, k, v, pattern=where & ~first, dropout=dropout, return_lse=True),
            ]
        )[0]


def moved(bias: Bias | None, at: Tensor | None) -> Bias | None:
    """`bias` for keys that stand at `at` rather than at their own indices."""
    if bias is None or at is None:
        return bias
    return bias[..., at] if isinstance(bias, Tensor) else lambda b, h, q, k: bias(b, h, q, at[k])
