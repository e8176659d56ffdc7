"""Attention by any similarity in place of the softmax's exponential, its rows normalised or not."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnlab.attend import attend
from attnlab.cards import ALL_FOUR, ANY_LENGTH, PERMUTATION_EQUIVARIANT, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import KVCache
from attnlab.nn.decode import attend_one
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern
from attnlab.weightings import Elementwise, Elu, Shares, Sigmoid, Weighting

SIMILARITIES: dict[str, Elementwise] = {"sigmoid": Sigmoid(0.0), "elu": Elu()}


@register(
    Card(
        name="similarity",
        title="When Attention Sink Emerges in Language Models: An Empirical View",
        paper="2410.10781",
        family="softmax",
        kind=TOKENS,
        capabilities=ALL_FOUR | STREAMING | ANY_LENGTH | PERMUTATION_EQUIVARIANT,
        cost="N²",
        growth=2.0,
        state="2 * kv_heads * head_dim * N",
        sample=dict(heads=4, kv_heads=2, normalise=True),
    )
)
class SimilarityAttention(MultiHead):
    """Attention whose weights are any function of the scores, alone or divided by their sum.

        y_i = Wo · Σ_j f(s_ij) v_j  [/ (Σ_j f(s_ij) + 1e-8) if normalised]        s_ij = q_i·k_j/√D + position

    x `(B, N, C)` → `(B, N, C)`; O(N²) time. A masked pair weighs exactly 0. Not normalised, keys do not compete and no
    attention sink forms, in the paper up to 1B parameters; with `normalise=True` one does. f = σ without normalisation
    is `SigmoidAttention(shift=0.0)`. Source: arXiv 2410.10781 (sail-sg/Attention-Sink).

    Args:
        similarity: f: "sigmoid", "elu" (elu(s) + 1), or any `Elementwise` of `attnlab.weightings`.
        normalise: rows of weights sum to one (f must not be negative then).
        Others as for `MultiHead`.
    """

    def __init__(
        self, dim: int, *, similarity: str | Elementwise = "sigmoid", normalise: bool = False, **keywords: Any
    ) -> None:
        super().__init__(dim, **keywords)
        if isinstance(similarity, str):
            if similarity not in SIMILARITIES:
                raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {similarity!r}")
            similarity = SIMILARITIES[similarity]
        if not isinstance(similarity, Elementwise):
            raise TypeError(f"similarity must be a name or an Elementwise, got {type(similarity).__name__}")
        self.weighting: Weighting = Shares(similarity) if normalise else similarity

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
        how: dict[str, Any] = dict(
            weighting=self.weighting, bias=self.position_bias(q, k, offset),
            dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        if pattern is None and q.shape[2] == 1:
            return attend_one([(q, k, v)], **how)
        return attend(q, k, v, pattern=pattern, **how)
