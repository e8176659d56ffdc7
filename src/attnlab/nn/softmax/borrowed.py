"""Attention whose maps come from other tokens than those it mixes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from attnlab.nn.cache import KVCache
from attnlab.nn.mechanism import split_heads
from attnlab.nn.multihead import MultiHead


class BorrowedMaps(MultiHead):
    """Queries and keys of one sequence decide how the values of another are mixed.

        y = Wo · attend(Wq s, Wk s, Wv x)        s, x (B, N, C) → (B, N, C)

    With s = x it is `MultiHead`, whose parameters it has. If s is one sequence for the whole batch, its keys are kept
    once. The "RndEmbQK", "FixedSeqQK" and "StaticEmbQK" mixers of arXiv 2510.11602 differ in what s is.
    """

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, state: KVCache | None = None, **keywords: Any
    ) -> Any:
        """Values of `x`, maps of `context` (B or 1, N, C), or of `x` itself if None; `(y, state)` with a state."""
        if context is None:
            return super().forward(x, state=state, **keywords)
        self.check(x, context.expand(len(x), -1, -1))
        self.refuse(**keywords)
        if context.shape[1] != x.shape[1]:
            raise ValueError(f"context must have x's length {x.shape[1]}, got {context.shape[1]}")
        if state is not None:
            self.check_state(state, KVCache, len(x))
        offset = 0 if state is None else state.length
        widths = [self.heads * self.head_dim, self.kv_heads * self.head_dim]
        weights, biases = self.wqkv.weight.split([sum(widths), widths[1]]), (None, None)
        if self.wqkv.bias is not None:
            biases = self.wqkv.bias.split([sum(widths), widths[1]])
        q, k = linear(context, weights[0], biases[0]).split(widths, -1)
        q, k = self.q_norm(split_heads(q, self.heads)), self.k_norm(split_heads(k, self.kv_heads))
        if self.position is not None:
            q, k = self.position(q, k, offset)
        v = split_heads(linear(x, weights[1], biases[1]), self.kv_heads)
        if state is not None:
            k, v = state.append(k, v)  # one sequence's keys serve the whole batch
        q, k = (t.expand(len(x), -1, -1, -1) for t in (q, k))
        where = self.where(None, offset, x.shape[1])
        y = self.merge(self.mix(q, k, v, x=x, pattern=where, offset=offset, state=state))
        return y if state is None else (y, state)
