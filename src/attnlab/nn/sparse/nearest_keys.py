"""Attention to the k most relevant keys of each query, and a word from all of them (KTPP's k-NN context attention)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnlab.cards import (
    ANY_LENGTH,
    EXACT,
    NONCAUSAL_SELF,
    PERMUTATION_EQUIVARIANT,
    TOKENS,
    Card,
    register,
)
from attnlab.nn.mechanism import split_heads
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern


@register(
    Card(
        name="nearest_keys",
        title="KNN Transformer with Pyramid Prompts for Few-Shot Learning",
        paper="2410.10227",
        family="sparse",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_LENGTH | PERMUTATION_EQUIVARIANT | EXACT,
        cost="N²",
        growth=2.0,
        sample=dict(heads=4, keep=0.5),
        limit=lambda dim, grid: NearestKeys(dim, heads=4, keep=1.0, bias=False, out_bias=False),
    )
)
class NearestKeys(MultiHead):
    """Each query sees its k most relevant keys, per head, and every token hears what all found on average.

        V' = softmax(the k largest of q_i·k_j/√D, −∞ elsewhere) V        y = Wo (V' + α · mean_n V'_n)

    x (B, N, C) → (B, N, C). k = ⌈keep · N⌉; of equal scores those are kept that `topk` takes. α is learned and starts
    at `alpha`; with keep = 1 and α = 0 it is softmax attention. Keys that are not kept have neither weight nor
    gradient. Cost: O(N²). Source: arXiv 2410.10227, of which the formula alone was at hand: where the mean is taken,
    α's start and the output's bias are ours, and arguments.

    Args:
        keep: the share of keys to keep, in (0, 1], or their number.
        context: what the mean is of: the "output" V', the "values" V, or the "input" x (of C = H·D channels).
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        keep: float = 0.7,
        alpha: float = 0.0,
        context: Literal["output", "values", "input"] = "output",
        bias: bool = True,
        out_bias: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        if causal:
            raise ValueError("causal must be False: the mean is over all tokens")
        if context not in ("output", "values", "input"):
            raise ValueError(f"context must be 'output', 'values' or 'input', got {context!r}")
        if keep <= 0 or (isinstance(keep, float) and keep > 1):
            raise ValueError(f"keep must be a share in (0, 1] or a whole number above 0, got {keep}")
        super().__init__(dim, heads=heads, bias=bias, out_bias=out_bias, dropout=dropout)
        self.keep, self.context = keep, context
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    def count(self, keys: int) -> int:
        """How many of so many keys a query sees."""
        # 0.7 · 10 is a little more than 7.
        return min(self.keep if isinstance(self.keep, int) else math.ceil(self.keep * keys - 1e-9), keys)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, pattern: Pattern | None = None, **_: Any) -> Tensor:
        keys = k.shape[2]
        count = self.count(keys)
        if count == keys:
            found = super().mix(q, k, v, x=x)
        else:
            best, at = (q * q.shape[-1] ** -0.5 @ k.mT).topk(count, dim=-1, sorted=False)
            weights = nn.functional.dropout(best.softmax(-1), self.dropout, self.training)
            found = torch.zeros_like(weights[..., :1]).expand(*weights.shape[:-1], keys).scatter(-1, at, weights) @ v
        if self.context == "input":
            return found
        return found + self.alpha * (found if self.context == "output" else v).mean(2, keepdim=True)

    def after(self, heads: Tensor, x: Tensor) -> Tensor:
        if self.context != "input":
            return heads
        return heads + self.alpha * split_heads(x.mean(1, keepdim=True), self.heads)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: Any = None,
    ) -> Tensor:
        self.refuse(context=context, pattern=pattern, state=state)
        return super().forward(x)
