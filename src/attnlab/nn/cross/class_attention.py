"""Class attention (CaiT): summary tokens read from themselves and the places; the places stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import ANY_LENGTH, NONCAUSAL_SELF, PERMUTATION_EQUIVARIANT, TOKENS, Card, register
from attnlab.nn.mechanism import Mechanism, check_heads, join_heads, split_heads


@register(
    Card(
        name="class_attention",
        title="Going Deeper with Image Transformers",
        paper="2103.17239",
        system="volo",
        family="cross",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_LENGTH | PERMUTATION_EQUIVARIANT,
        cost="M (M + N)",
        growth=2.0,
        sample={"heads": 4},
    )
)
class ClassAttention(Mechanism):
    """Lets a few summary tokens (a class token) gather from all tokens, at a cost linear in the number of places.

        y = Wo attend(Wq x, Wk [x, context], Wv [x, context])

    x (B, M, C), M = 1 for a class token, and context (B, N, C) → (B, M, C). Without a context, x attends to itself.
    Summary tokens see each other too, so this is not cross-attention in the taxonomy's sense.
    Cost: 2 (M + N) C² + 2 M (M + N) C. Source: arXiv 2103.17239; the last two layers of VOLO (arXiv 2106.13112).
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim)
        if causal:
            raise ValueError("causal must be False: a summary token reads all tokens")
        width = heads * check_heads(dim, heads, head_dim=head_dim)[1]
        self.heads, self.scale, self.dropout = heads, scale, dropout
        self.wq = nn.Linear(dim, width, bias=bias)
        self.wkv = nn.Linear(dim, 2 * width, bias=bias)
        self.wo = nn.Linear(width, dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, grid: Any = None, pattern: Any = None, state: Any = None
    ) -> Tensor:
        self.check(x, context)
        self.refuse(pattern=pattern, state=state)
        source = x if context is None else torch.cat((x, context), dim=1)
        k, v = self.wkv(source).chunk(2, dim=-1)
        q, k, v = (split_heads(t, self.heads) for t in (self.wq(x), k, v))
        return self.wo(join_heads(attend(q, k, v, scale=self.scale, dropout=self.dropout if self.training else 0.0)))
