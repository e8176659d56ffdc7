"""k-nearest-neighbour context attention: each token reads its k best keys, and all get the mean of what was read."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import ANY_LENGTH, EXACT, NONCAUSAL_SELF, PERMUTATION_EQUIVARIANT, TOKENS, Card, register
from attnlab.nn.mechanism import split_heads
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern

Context = Literal["output", "input", "values"]


@register(
    Card(
        name="knn_context",
        title="KNN Transformer with Pyramid Prompts for Few-Shot Learning",
        paper="2410.10227",
        family="sparse",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_LENGTH | PERMUTATION_EQUIVARIANT | EXACT,
        cost="N²",
        growth=2.0,
        sample=dict(heads=4),
        limit=lambda dim, grid: KNNContext(dim, heads=4, keep=1.0),
    )
)
class KNNContext(MultiHead):
    """Softmax attention over each query's k best keys, plus a learned share of the mean of what all queries read.

        V'_i = Σ_{j in top-k of s_i} softmax_j(s_ij) v_j,  s_ij = q_i·k_j / √D        y = Wo (V' + α mean_i V'_i)

    x (B, N, C) → the same; k = ⌈keep · N⌉, chosen by each head for each query, and no gradient goes to the other keys.
    With k = N and α = 0 this is softmax attention. Of equal scores, torch's `topk` chooses. Cost O(N²): all scores
    are computed. Source: arXiv 2410.10227, of which no code was released; `context` and α's start are ours.

    Args:
        keep: the share of the keys, in (0, 1], or k itself, an int.
        alpha: where the learned α starts.
        context: of what the mean is: the "output" V' (the paper's), the "values", or the "input" x.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        keep: float | int = 0.5,
        alpha: float = 0.0,
        context: Context = "output",
        bias: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        if causal:
            raise ValueError("causal must be False: every token gets the mean over all")
        if not (keep >= 1 if isinstance(keep, int) else 0 < keep <= 1):
            raise ValueError(f"keep must be a share in (0, 1] or a number of keys of at least 1, got {keep}")
        if context not in ("output", "input", "values"):
            raise ValueError(f"context must be 'output', 'input' or 'values', got {context!r}")
        super().__init__(dim, heads=heads, bias=bias, dropout=dropout)
        self.keep, self.context = keep, context
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    def count(self, keys: int) -> int:
        """k, of so many keys."""
        # 0.29 · 100 is a little less than 29, and 0.07 · 100 a little more than 7.
        return min(self.keep, keys) if isinstance(self.keep, int) else max(1, math.ceil(self.keep * keys - 1e-6))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, **given: Any) -> Tensor:
        dropout, keys = self.dropout if self.training else 0.0, k.shape[2]
        if (count := self.count(keys)) == keys:
            heads = attend(q, k, v, dropout=dropout)
        else:
            scores = (q * self.head_dim**-0.5) @ k.mT
            # Whichever are fewer are looked for: those that stay, or those that go.
            few = min(count, keys - count)
            found = scores.detach().topk(few, dim=-1, largest=few == count, sorted=False).indices
            hidden = torch.full_like(scores, few == count, dtype=torch.bool).scatter(-1, found, few != count)
            weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
            heads = F.dropout(weights, dropout) @ v
        if self.context == "input":
            mean = split_heads(x.mean(1, keepdim=True), self.heads)
        else:
            mean = (heads if self.context == "output" else v).mean(2, keepdim=True)
        return heads + self.alpha * mean

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
