"""The pointer: additive attention whose weights over the context are themselves the answer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnlab.nn.mechanism import Mechanism


class Pointer(Mechanism):
    """Points at places of a context: queries (B, M, C), context (B, N, C) → scores (B, M, N), and no values.

        u_ij = v · tanh(W2 query_i + W1 context_j)        p_i = softmax_j u_ij

    Any N, whatever it was trained at: the output's vocabulary is the input. Cost: 2 (M + N) C² + 3 M N C, and M N C
    memory. Source: arXiv 1506.03134; as attention, with values, arXiv 1409.0473.

    Args:
        bias: biases in both projections.
    """

    def __init__(self, dim: int, *, bias: bool = False) -> None:
        super().__init__(dim)
        self.wq = nn.Linear(dim, dim, bias=bias)
        self.wk = nn.Linear(dim, dim, bias=bias)
        self.v = nn.Parameter(torch.empty(dim).uniform_(-(dim**-0.5), dim**-0.5))

    def keys(self, context: Tensor) -> Tensor:
        """W1 context, once for all queries: (B, N, C)."""
        return self.wk(context)

    def score(self, query: Tensor, keys: Tensor) -> Tensor:
        """(B, M, N) from queries (B, M, C) and `keys(context)`."""
        return (self.wq(query).unsqueeze(2) + keys.unsqueeze(1)).tanh() @ self.v

    def forward(self, query: Tensor, context: Tensor, *, allowed: Tensor | None = None) -> Tensor:
        """Scores; −∞ where `allowed`, broadcastable to (B, M, N), is false."""
        self.check(query, context)
        scores = self.score(query, self.keys(context))
        return scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
