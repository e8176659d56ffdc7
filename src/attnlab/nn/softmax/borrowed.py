"""Attention whose maps come from other tokens than those it mixes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnlab.nn.cache import KVCache
from attnlab.nn.multihead import MultiHead


class BorrowedMaps(MultiHead):
    """Queries and keys of one sequence decide how the values of another are mixed.

        y = Wo · attend(Wq s, Wk s, Wv x)        s, x (B, N, C) → (B, N, C)

    With s = x it is `MultiHead`, whose parameters it has. The "RndEmbQK", "FixedSeqQK" and "StaticEmbQK" mixers of
    arXiv 2510.11602 differ in what s is.
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
        q, k, _ = self.project(context, None, offset)
        q, k = (t.expand(len(x), -1, -1, -1) for t in (q, k))
        v = self.qkv(x)[2]
        if state is not None:
            k, v = state.append(k, v)
        where = self.where(None, offset, x.shape[1])
        y = self.merge(self.mix(q, k, v, x=x, pattern=where, offset=offset, state=state))
        return y if state is None else (y, state)
