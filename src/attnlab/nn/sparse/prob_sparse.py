"""ProbSparse: only queries whose weights are far from uniform look; the others take the mean of all values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnlab.attend import attend
from attnlab.cards import ANY_LENGTH, EXACT, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.mechanism import check_turns
from attnlab.nn.multihead import MultiHead

_ELEMENTS = 2**22  # numbers of sampled keys that are gathered at a time


@register(
    Card(
        name="prob_sparse",
        title="Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting",
        paper="2012.07436",
        family="sparse",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_LENGTH | EXACT,
        cost="N log N",
        growth=1.1,
        sample=dict(heads=4, factor=2),
        limit=lambda dim, grid: ProbSparseAttention(dim, heads=4, factor=2**20),
    )
)
class ProbSparseAttention(MultiHead):
    """Softmax attention for the u most active queries of each head; every other token gives the mean of the values.

        M(q_i) = max_j q_i·k_j − Σ_j q_i·k_j / N       over U keys j drawn for each query; u = U = factor · ⌈ln N⌉
        y_i = Wo · softmax(q_i kᵀ/√D) v  for the u largest M,  Wo · mean(v)  for the others

    x (B, N, C) → (B, N, C), O(N · C · log N): uniform weights are the mean, so only queries far from them are worth
    their price. Whether a query is among the u depends on all others, so it is neither causal nor cross-attention.
    With u ≥ N it is softmax attention. Source: arXiv 2012.07436 (zhouhaoyi/Informer2020; Shark-NLP/CAB).

    Args:
        factor: of u and U. position: turns q and k.
        seed: of the sample in evaluation, which a length always has; while training every call draws another.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        factor: int = 5,
        seed: int = 0,
        bias: bool = True,
        causal: bool = False,
        position: Any = None,
    ) -> None:
        if causal:
            raise ValueError("causal must be False: which queries look depends on all of them")
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        check_turns(position)
        super().__init__(dim, heads=heads, bias=bias, position=position)
        self.factor, self.seed = factor, seed

    def count(self, tokens: int) -> int:
        """How many queries look, and at how many keys it is decided for each."""
        return min(tokens, max(1, self.factor * math.ceil(math.log(tokens))))

    def sample(self, tokens: int, device: torch.device) -> Tensor:
        """Keys for each query, (N, U)."""
        shape = (tokens, self.count(tokens))
        if self.training:
            return torch.randint(tokens, shape, device=device)
        # A hash of the two indices in place of a generator, whose state no traced graph could hold.
        at = torch.arange(shape[0] * shape[1], device=device).view(shape) + 1 + self.seed * 7919
        for prime in (0x45D9F3B, 0x119DE1F3):
            at = ((at >> 15) ^ at) * prime & 0x7FFFFFFF
        return ((at >> 15) ^ at) % tokens

    @torch.no_grad()
    def activity(self, q: Tensor, k: Tensor, sample: Tensor) -> Tensor:
        """M (B, H, N) of queries and keys (B, H, N, D), from each query's sampled keys."""
        found, step = [], max(1, _ELEMENTS // (sample.shape[1] * k[:, :, 0].numel()))
        for some, at in zip(q.split(step, 2), sample.split(step), strict=True):
            scores = (k[:, :, at] @ some.unsqueeze(-1)).squeeze(-1)
            found.append(scores.amax(-1) - scores.sum(-1) / k.shape[2])
        return torch.cat(found, 2)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Any = None,
        state: Any = None,
        sample: Tensor | None = None,
    ) -> Tensor:
        """As every mechanism; `sample` (N, U) are keys to decide by, in place of drawn ones."""
        self.check(x)
        self.refuse(context=context, pattern=pattern, state=state)
        q, k, v = self.project(x, grid=grid if self.on_grid else None)
        tokens = x.shape[1]
        if (active := self.count(tokens)) == tokens:
            return self.merge(attend(q, k, v, dropout=self.dropout if self.training else 0.0))
        sample = self.sample(tokens, x.device) if sample is None else sample
        chosen = self.activity(q, k, sample).topk(active, sorted=False).indices.unsqueeze(-1)
        chosen = chosen.expand(-1, -1, -1, self.head_dim)
        lazy = v.mean(2, keepdim=True).expand_as(v)
        return self.merge(lazy.scatter(2, chosen, attend(q.gather(2, chosen), k, v)))
