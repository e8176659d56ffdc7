"""H2O: full attention whose cache drops the tokens that have been attended to least."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.heavy_cache import HeavyHitterCache
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern


@register(
    Card(
        name="heavy_hitters",
        title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        paper="2306.14048",
        system="sinklora",
        family="sparse",
        kind=TOKENS,
        capabilities=CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N (heavy + recent)",
        sample=dict(heads=4, kv_heads=2, heavy=12, recent=8),
        state="kv_heads * (2 * head_dim + 2) * (N if N < prompt else min(N, heavy + recent))",
    )
)
class HeavyHitters(MultiHead):
    """Causal attention to the tokens that earlier queries attended to most, and to the last ones: for decoding.

        y_i = Wo · softmax(q_i k_j / √d) v_j        over j ∈ S ∪ {i}, S the at most heavy + recent tokens kept so far

    x (B, N, C) → (B, N, C). Which token each head drops after each step is `HeavyHitterCache`'s rule. Weights of a
    trained `MultiHead` fit: its cache stops growing at heavy + recent tokens, and with N ≤ heavy + recent nothing
    changes. `heavy=0` is a window. As each choice rests on all before it, tokens past the first ones are read one by
    one, in O(heavy + recent) each; it is not meant for training. A long prompt is read at once, and in full, if the
    mechanism (or `initial_state`) knows its length. Sources: arXiv 2306.14048; with SinkLoRA's models, 2406.05678.

    Args:
        heavy, recent: how many of each are kept; recent is at least 1.
        prompt: how many tokens are read with full attention before anything is dropped.
        Others as for `MultiHead`; a position may turn queries and keys, not add a bias.
    """

    causal_only = "it drops what was attended to least so far"

    def __init__(
        self,
        dim: int,
        *,
        heavy: int = 256,
        recent: int = 256,
        prompt: int = 0,
        causal: bool = True,
        **keywords: Any,
    ) -> None:
        super().__init__(dim, causal=causal, **keywords)
        for name, value, least in (("heavy", heavy, 0), ("recent", recent, 1), ("prompt", prompt, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.dropout:
            raise ValueError(f"dropout must be 0: what is dropped here are tokens; got {self.dropout}")
        self.heavy, self.recent, self.prompt = heavy, recent, prompt

    def initial_state(
        self,
        batch: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        prompt: int | None = None,
    ) -> HeavyHitterCache:
        """An empty cache; `prompt`, if given, in place of the mechanism's own."""
        prompt = self.prompt if prompt is None else prompt
        return HeavyHitterCache(self.heavy, self.recent, prompt, owner=self.owner(batch))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: Any = None,
    ) -> Any:
        self.refuse(context=context, pattern=pattern, grid=grid)
        self.check(x)
        cache = self.initial_state(len(x)) if state is None else state
        self.check_state(cache, HeavyHitterCache, len(x))
        offset = cache.length
        q, k, v = self.project(x, None, offset)
        if self.position_bias(q, k, offset) is not None:
            raise ValueError(f"position must turn queries and keys, got {type(self.position).__name__}, a bias")
        y = self.merge(cache.read(q, k, v))
        return y if state is None else (y, cache)

    def weights(self, x: Tensor, context: Tensor | None = None, **keywords: Any) -> Tensor:
        """The weights `(B, H, N, N)` with which `forward(x)` mixes values: to look at, small N."""
        self.refuse(context=context, **keywords)
        q, k, _ = self.project(x)
        units = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
        return self.initial_state(len(x)).read(q, k, units)
