"""Softmax attention with a learned key and value beside those of the tokens: a place where idle attention can go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import ALL_FOUR, ANY_LENGTH, PERMUTATION_EQUIVARIANT, STREAMING, TOKENS, Card, register
from attnlab.merging import merge
from attnlab.nn.cache import KVCache
from attnlab.nn.decode import attend_one
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Causal, Pattern


@register(
    Card(
        name="kv_bias",
        title="When Attention Sink Emerges in Language Models: An Empirical View",
        paper="2410.10781",
        family="softmax",
        kind=TOKENS,
        capabilities=ALL_FOUR | STREAMING | ANY_LENGTH | PERMUTATION_EQUIVARIANT,
        cost="N²",
        growth=2.0,
        state="2 * kv_heads * head_dim * N",
        sample=dict(heads=4, kv_heads=2),
    )
)
class KVBias(MultiHead):
    """Softmax attention with one more slot, of a learned key k* and value v*, that every query sees.

        y_i = Wo · Σ_j w_ij v_j + w_i* v*        w_i = softmax over (q_i·k*, q_i·k_1, q_i·k_2, …) / √D

    x `(B, N, C)` → `(B, N, C)`; cost as `MultiHead`, and 2·D numbers, or 2·H·D. The slot stands nowhere: k* is not
    turned and has no position bias. It takes the sink upon itself, so that the first token of a text needs not be one;
    v* = 0 is enough for that ("K bias", `value=False`). Then k* = 0 is the off-by-one softmax, and q·k* → −∞ plain
    attention. Without the slot ("V bias", `key=False`) v* is added to every head, and prevents nothing. Source: arXiv
    2410.10781 (sail-sg/Attention-Sink).

    Args:
        key, value: whether k* and v* are there.
        per_head: each key-value head has its own k* and v*; False shares them. Without the slot each head has its v*.
        Others as for `MultiHead`.
    """

    def __init__(
        self, dim: int, *, key: bool = True, value: bool = True, per_head: bool = True, **keywords: Any
    ) -> None:
        super().__init__(dim, **keywords)
        if not (key or value):
            raise ValueError("key or value must be True: without both this is MultiHead")
        heads = self.kv_heads if key else self.heads
        shape = (heads, self.head_dim) if per_head else (self.head_dim,)
        self.per_head = per_head
        self.k_bias = nn.Parameter(torch.randn(shape) * 0.02) if key else None
        self.v_bias = nn.Parameter(torch.randn(shape) * 0.02) if value else None

    def slot(self, bias: Tensor | None, like: Tensor) -> Tensor:
        """k* or v* as one more token of `like (B, Hkv, N, D)`: `(B, Hkv, 1, D)`."""
        if bias is None:
            return like.new_zeros(()).expand(*like.shape[:2], 1, like.shape[3])
        return bias.to(like.dtype).unsqueeze(-2).expand(*like.shape[:2], 1, -1)

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
        if self.k_bias is not None:
            return self.mix_slot(q, k, v, self.slot(self.v_bias, v), pattern=pattern, offset=offset)
        heads = super().mix(q, k, v, x=x, pattern=pattern, offset=offset, state=state)
        return heads if self.v_bias is None else heads + self.v_bias.to(heads.dtype).unsqueeze(-2)

    def mix_slot(
        self, q: Tensor, k: Tensor, v: Tensor, v_slot: Tensor, *, pattern: Pattern | None, offset: int = 0
    ) -> Tensor:
        """Heads `(B, H, N, Dv)` with the slot, whose values are `v_slot (B, Hkv, 1, Dv)`."""
        dropout, bias = self.dropout if self.training else 0.0, self.position_bias(q, k, offset)
        k_slot = self.slot(self.k_bias, k)
        if bias is None and pattern is None and q.shape[2] == 1:
            return attend_one([(q, k_slot, v_slot), (q, k, v)], dropout=dropout)
        if bias is None and (pattern is None or type(pattern) is Causal):
            k, v = torch.cat((k_slot, k), 2), torch.cat((v_slot, v), 2)
            if pattern is None:
                return attend(q, k, v, dropout=dropout)
            # A query for the slot keeps the matrix square, and so in reach of torch's causal kernels.
            q = torch.cat((torch.zeros_like(q[:, :, :1]), q), 2)
            return attend(q, k, v, pattern=pattern, dropout=dropout)[:, :, 1:]
        seen = attend(q, k, v, pattern=pattern, bias=bias, dropout=dropout, return_lse=True)
        return merge([seen, attend(q, k_slot, v_slot, return_lse=True)])[0]

    def weights(self, x: Tensor, context: Tensor | None = None, *, slot: bool = False, **keywords: Any) -> Tensor:
        """The weights `(B, H, N, M)` of the tokens, or with `slot` `(B, H, N, 1 + M)`, the slot's first; small N."""
        q, k, _ = self.project(x, context, grid=keywords.pop("grid", None) if self.on_grid else None)
        pattern = self.where(keywords.pop("pattern", None), 0, x.shape[1])
        self.refuse(**keywords)
        size = k.shape[2]
        if self.k_bias is None:
            if slot:
                raise ValueError("slot must be False: with key=False there is none")
            units = torch.eye(size, dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
            return super().mix(q, k, units, x=x, pattern=pattern)
        units = torch.eye(1 + size, dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
        weights = self.mix_slot(q, k, units[:, :, 1:], units[:, :, :1], pattern=pattern)
        return weights if slot else weights[..., 1:]
