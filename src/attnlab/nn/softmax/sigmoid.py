"""Sigmoid attention: each key is weighed on its own, by a sigmoid in place of the softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import ALL_FOUR, ANY_LENGTH, PERMUTATION_EQUIVARIANT, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import KVCache
from attnlab.nn.decode import attend_one
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern
from attnlab.weightings import Sigmoid, Weighting


@register(
    Card(
        name="sigmoid",
        title="Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
        paper="2409.04431",
        system="sigmoid",
        family="softmax",
        kind=TOKENS,
        capabilities=ALL_FOUR | STREAMING | ANY_LENGTH | PERMUTATION_EQUIVARIANT,
        cost="N²",
        growth=2.0,
        state="2 * kv_heads * head_dim * N",
        sample=dict(heads=4, kv_heads=2, length=128),
    )
)
class SigmoidAttention(MultiHead):
    """Attention whose weights are sigmoids of the scores: no key competes with another, and rows need not sum to one.

        y = Wo · σ(eᵗ (q·k/√D + position) − log n) v        x (B, N, C) → (B, N, C)

    With the shift −log n a row of zero scores sums to n/(n + 1), so training starts as softmax does; without it the
    output grows with N. Masked pairs weigh exactly 0. Changing one key changes one column of the weights. Cost O(N²).
    The authors advise ALiBi or the shift, a norm on q and k, and in vision a layer scale.
    Source: arXiv 2409.04431 (apple/ml-sigmoid-attention).

    Args:
        length: n, the longest training text or the number of patches; the number of keys of each call if None, which
            cannot stream since it would change from piece to piece.
        shift: what stands in place of −log n.
        temperature: t; it scales the position's bias too. With the shift it is part of the `state_dict`.
        v_norm: builds a norm of the values per head from a width (the authors' cross-attention has LayerNorm there).
        out_norm: builds a norm of the output from a width: the authors' hybrid norm, for stable training on long texts.
        rows: divides the output of the i-th query, i ≥ 1, by iʳᵒʷˢ (the authors' normalised variants: ½ and 1).
        Others as for `MultiHead`.
    """

    def __init__(
        self,
        dim: int,
        *,
        length: int | None = None,
        shift: float | None = None,
        temperature: float = 0.0,
        v_norm: Callable[[int], nn.Module] | None = None,
        out_norm: Callable[[int], nn.Module] | None = None,
        rows: float = 0.0,
        **keywords: Any,
    ) -> None:
        super().__init__(dim, **keywords)
        if length is not None and (length < 1 or shift is not None):
            raise ValueError(f"length must be at least 1 and excludes shift, got length={length}, shift={shift}")
        self.shift = -math.log(length) if length is not None else shift
        self.temperature, self.rows = temperature, rows
        self.v_norm = v_norm(self.head_dim) if v_norm else nn.Identity()
        self.out_norm = out_norm(dim) if out_norm else nn.Identity()

    @property
    def weighting(self) -> Weighting:
        """What makes weights of scores."""
        return Sigmoid(self.shift)

    def qkv(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().qkv(x, context)
        return q, k, self.v_norm(v)

    def merge(self, heads: Tensor) -> Tensor:
        return self.out_norm(super().merge(heads))

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
        heat = math.exp(self.temperature)
        bias = self.position_bias(q, k, offset)
        if bias is not None and heat != 1.0:
            cold = bias
            bias = cold * heat if isinstance(cold, Tensor) else lambda b, h, q, k: cold(b, h, q, k) * heat
        how: dict[str, Any] = dict(
            weighting=self.weighting, bias=bias, scale=heat * self.head_dim**-0.5,
            dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        if pattern is None and state is not None:
            y = attend_one([(q, k, v)], **how)
        else:
            y = attend(q, k, v, pattern=pattern, **how)
        if self.rows:
            place = torch.arange(offset + 1, offset + 1 + q.shape[2], device=q.device, dtype=q.dtype)
            y = y / place.pow(self.rows)[:, None]
        return y

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        if self.shift is None:
            raise ValueError("streaming needs length (or shift): −log n must not change from piece to piece")
        return super().initial_state(batch, device=device, dtype=dtype)

    def get_extra_state(self) -> Tensor:
        """Temperature and shift, so that a checkpoint carries the length it was trained with."""
        return torch.tensor([self.temperature, math.nan if self.shift is None else self.shift], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.temperature, shift = state.tolist()
        self.shift = None if math.isnan(shift) else shift
