"""Attention whose heads also speak through tokens of their own, one for each head (DHVT)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_LENGTH, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern


@register(
    Card(
        name="head_tokens",
        title="Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets",
        paper="2210.05958",
        system="dhvt",
        family="softmax",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_LENGTH,
        cost="(N + H)²",
        growth=2.0,
        sample=dict(heads=4),
    )
)
class HeadTokens(MultiHead):
    """Softmax attention among the tokens and H head tokens, through which the heads see each other's part of the image.

        t_h = gelu(norm(Wt · mean over all tokens of channel segment h)) + e_h         of C channels, h = 1..H
        y, z = Wo · attend(x ∪ t)                                                      z the head tokens'
        y_0 ← y_0 + mean_h z_h                                                         y_0 the class token

    x (B, N, C), the class token first, → (B, N, C), cost O((N + H)²). Without a place of its own, so tokens but the
    first may be permuted. Source: arXiv 2210.05958.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
    ) -> None:
        if causal:
            raise ValueError(f"{type(self).__name__} has no causal form: head tokens are means over all tokens")
        super().__init__(dim, heads=heads, bias=bias, out_bias=out_bias, dropout=dropout)
        self.head_embedding = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, dim), std=0.02))
        self.head_in, self.head_norm = nn.Linear(self.head_dim, dim), nn.LayerNorm(self.head_dim)

    def head_tokens(self, x: Tensor) -> Tensor:
        """`(B, H, C)` of the tokens `(B, N, C)`."""
        segments = x.mean(1).unflatten(-1, (self.heads, self.head_dim))
        raw = self.head_in(segments).unflatten(-1, (self.heads, self.head_dim))
        return F.gelu(self.head_norm(raw)).flatten(-2) + self.head_embedding

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: Any = None,
    ) -> Tensor:
        self.check(x)
        self.refuse(context=context, pattern=pattern, state=state)
        everyone = torch.cat((x, self.head_tokens(x)), 1)
        first, others, z = super().forward(everyone).split([1, x.shape[1] - 1, self.heads], 1)
        return torch.cat((first + z.mean(1, keepdim=True), others), 1)
