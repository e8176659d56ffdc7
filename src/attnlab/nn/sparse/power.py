"""PowerAttention: blocks at power-of-two distances, so that a logarithmic number of layers reaches every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnlab.cards import ANY_LENGTH, CAUSAL_CROSS, CAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import KVCache
from attnlab.nn.decode import attend_one
from attnlab.nn.mechanism import pattern_for
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern, PowersOfTwo


@register(
    Card(
        name="power",
        title="PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention",
        paper="2503.03588",
        system="power_attention",
        family="sparse",
        kind=TOKENS,
        capabilities=CAUSAL_SELF | CAUSAL_CROSS | STREAMING | ANY_LENGTH,
        cost="N b (log N/b + w + s)",
        growth=1.1,
        state="2 * kv_heads * head_dim * N",
        sample=dict(heads=4, kv_heads=2, block=8, window=2, sinks=1),
    )
)
class PowerAttention(MultiHead):
    """Causal softmax attention to blocks at distance 0, 1, 2, 4, 8, …: l layers reach any token within 2ˡ blocks.

        query i sees key j ≤ i  ⟺  δ is 0 or a power of two, or δ < w, or ⌊j/b⌋ < s        δ = ⌊i/b⌋ − ⌊j/b⌋

    x (B, N, C) → (B, N, C). A token D blocks away is reached in popcount(D) layers, against D/(w − 1) for a window at
    the same price. Nothing can be dropped from the cache, since keys come back into sight at each power, but a decoding
    step reads only the log₂ N blocks it sees. Not to be confused with symmetric power attention, a linear one.
    Source: arXiv 2503.03588, whose defaults these are.

    Args:
        block, window, sinks: b tokens, w and s blocks.
        Others as for `MultiHead`.
    """

    causal_only = "its pattern looks back"

    def __init__(
        self, dim: int, *, block: int = 256, window: int = 5, sinks: int = 1, causal: bool = True, **keywords: Any
    ) -> None:
        super().__init__(dim, causal=causal, **keywords)
        self.pattern = PowersOfTwo(block=block, window=window, sinks=sinks)

    def where(self, given: Pattern | None, offset: int, queries: int) -> Pattern | None:
        return pattern_for(self.causal, given, offset, own=self.pattern)

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
        if state is None or q.shape[2] > 1 or pattern != self.pattern.starting_at(offset):
            return super().mix(q, k, v, x=x, pattern=pattern, offset=offset, state=state)
        spans = self.spans(offset)
        bias, at = self.position_bias(q, k, offset), None
        if bias is not None:
            at = torch.cat([torch.arange(a, b, device=q.device) for a, b in spans])
        parts = [(q, k[:, :, a:b], v[:, :, a:b]) for a, b in spans]
        return attend_one(parts, bias=bias, at=at, dropout=self.dropout if self.training else 0.0)

    def spans(self, position: int) -> list[tuple[int, int]]:
        """The stretches of keys that the query at `position` sees, in order and disjoint: at most log₂ of its block."""
        p = self.pattern
        own = position // p.block
        blocks = {*range(min(p.sinks, own + 1)), *range(max(own - p.window + 1, 0), own + 1)}
        blocks |= {own - 2**i for i in range(own.bit_length())}
        spans: list[tuple[int, int]] = []
        for block in sorted(blocks):
            start, stop = block * p.block, min((block + 1) * p.block, position + 1)
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], stop)
            else:
                spans.append((start, stop))
        return spans
