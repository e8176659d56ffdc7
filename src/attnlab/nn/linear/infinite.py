"""Infinite self-attention: attention as a graph of affinities whose series of ever longer walks converges."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_LENGTH, NONCAUSAL_SELF, PERMUTATION_EQUIVARIANT, TOKENS, Card, register
from attnlab.nn.mechanism import split_heads
from attnlab.nn.multihead import MultiHead
from attnlab.nn.untouched import recorded

_TITLE = "Self-Attention And Beyond the Infinite: Towards Linear Transformers with Infinite Self-Attention"
_EPS = 1e-6
_ROWS = 256  # queries of one sample at a time where nothing is kept for a backward pass (CPU)


def spectral_attention(q: Tensor, k: Tensor, v: Tensor, rho: Tensor | float, dropout: float = 0.0) -> Tensor:
    """ρ A v with A = relu(q kᵀ / D) of Frobenius norm 1, over all queries and keys of a head: `(B, H, N, Dv)`."""
    parts = q.device.type == "cpu" and not recorded(q, k, v)
    if parts and q.dim() == 4 and len(q) > 1 and not torch.compiler.is_compiling():
        samples = zip(q.split(1), k.split(1), v.split(1), strict=True)
        return torch.cat([spectral_attention(*sample, rho, dropout) for sample in samples])
    q = q / q.shape[-1]
    outputs, norms = [], []
    for rows in q.split(_ROWS, -2) if parts else (q,):
        affinity = (rows @ k.mT).relu_()
        norms.append(torch.linalg.vector_norm(affinity, dim=(-2, -1)))
        outputs.append((F.dropout(affinity, dropout) if dropout else affinity) @ v)
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -2)
    return output * (rho / (norm + _EPS))[..., None, None]


def pooled_query(q: Tensor) -> Tensor:
    """Σ_t ‖q_t‖ q_t / Σ_t ‖q_t‖, `(…, D)` of `(…, N, D)`: what the queries ask together, the loud ones louder."""
    energy = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    return (energy.mT @ q).squeeze(-2) / (energy.sum(-2) + _EPS)


def centrality(q: Tensor, k: Tensor) -> Tensor:
    """How much each key matters to all queries, `(…, M)`, positive and of sum 1: an estimate of the eigenvector."""
    scale = q.shape[-1] ** -0.5
    a = ((scale * k) @ pooled_query(scale * q).unsqueeze(-1)).squeeze(-1).relu()
    return a / (a.sum(-1, keepdim=True) + _EPS)


@register(
    Card(
        name="infsa",
        title=_TITLE,
        paper="2603.00175",
        system="infsa",
        family="linear",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_LENGTH | PERMUTATION_EQUIVARIANT,
        cost="N²",
        growth=2.0,
        sample={"heads": 4},
    )
)
class InfiniteAttention(MultiHead):
    """Attention by positive affinities, without softmax: a stack of L layers sums the walks of up to L steps.

        A = relu(q kᵀ / D);  y = Wo (ρ A / ‖A‖_F) v        ‖A‖_F over all queries and keys of a head

    x (B, N, C), and context (B, M, C) if given → (B, N, C). Rows do not sum to 1, and the output grows with v alone:
    scaling q changes nothing. The norm bounds the spectral radius by ρ < 1, so that Σ (ρA)^k converges
    (`attnlab.lens.centrality` has the sum and its readings). Where no affinity is positive the output is 0.
    Cost: 4NC² + 4N²C. Source: arXiv 2603.00175 (giorgioroffo/infinite-self-attention), whose layers are single hops.

    Args:
        rho: ρ at first; sigmoid of a scalar that is learned, or, with train_rho=False, stays. The released module
            has it as a parameter that no gradient reaches.
        dropout: of the affinities, while training.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        bias: bool = True,
        rho: float = 0.95,
        train_rho: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
    ) -> None:
        if causal:
            raise ValueError("causal must be False: the norm is over all tokens")
        if not 0.0 < rho < 1.0:
            raise ValueError(f"rho must be in (0, 1), got {rho}")
        super().__init__(dim, heads=heads, bias=bias, dropout=dropout)
        logit = torch.tensor(math.log(rho / (1 - rho)))
        self.rho_logit = nn.Parameter(logit, requires_grad=train_rho)
        for layer in (*self.wqkv.weight.chunk(3), self.wo.weight):
            nn.init.xavier_uniform_(layer)
        for part in (self.wqkv.bias, self.wo.bias):
            if part is not None:
                nn.init.zeros_(part)

    @property
    def rho(self) -> Tensor:
        return self.rho_logit.sigmoid()

    def heads_of(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The heads' outputs `(B, H, N, D)` from projected q, k and v."""
        return spectral_attention(q, k, v, self.rho, self.dropout if self.training else 0.0)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, grid: Any = None, pattern: Any = None, state: Any = None
    ) -> Tensor:
        self.check(x, context)
        self.refuse(pattern=pattern, state=state)
        return self.merge(self.heads_of(*self.qkv(x, context)))

    def weights(self, x: Tensor, context: Tensor | None = None, **keywords: Any) -> Tensor:
        """ρ A / ‖A‖_F, `(B, H, N, M)`: to look at, small N."""
        q, k, _ = self.qkv(x, context)
        units = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
        return spectral_attention(q, k, units, self.rho)


@register(
    Card(
        name="linear_infsa",
        title=_TITLE,
        paper="2603.00175",
        system="infsa",
        family="linear",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_LENGTH | PERMUTATION_EQUIVARIANT,
        cost="N",
        growth=1.0,
        sample={"heads": 4},
    )
)
class LinearInfiniteAttention(InfiniteAttention):
    """Infinite self-attention in linear time: every token receives the same, the values weighed by their centrality.

        q̄ = Σ_t ‖q_t‖ q_t / Σ_t ‖q_t‖;  a = relu(k q̄ / D);  y_i = Wo Σ_t ρ (a_t / Σ a) v_t, for all i

    x (B, N, C), and context (B, M, C) if given → (B, N, C), an expanded view. `a` stands for the dominant eigenvector
    of the affinities. Where tokens are is known from the residual path alone. As one query is asked and one vector
    answered, keys, values and outputs need not be projected token by token: 2NC² + 4NCH in all, a quarter of what the
    equation reads like. Source: arXiv 2603.00175. Arguments as of `InfiniteAttention`.
    """

    def heads_of(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = centrality(q, k).unsqueeze(-2)
        a = F.dropout(a, self.dropout) if self.dropout and self.training else a
        return (self.rho * (a @ v)).expand(-1, -1, q.shape[2], -1)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, grid: Any = None, pattern: Any = None, state: Any = None
    ) -> Tensor:
        self.check(x, context)
        self.refuse(pattern=pattern, state=state)
        source, scale = x if context is None else context, self.head_dim**-0.5
        weights = self.wqkv.weight.view(3, self.heads, self.head_dim, self.dim)
        biases = None if self.wqkv.bias is None else self.wqkv.bias.view(3, self.heads, self.head_dim)
        rows = self.wqkv.weight[: self.dim]
        q = split_heads(F.linear(x, rows, None if biases is None else biases[0].flatten()), self.heads)
        asked = pooled_query(scale * q)  # (B, H, D), and through Wk to what a token is compared with, (B, H, C)
        a = torch.einsum("bhd,hdc->bhc", asked, weights[1]) @ source.mT
        if biases is not None:
            a = a + (asked * biases[1]).sum(-1, keepdim=True)
        a = (scale * a).relu()
        a = a / (a.sum(-1, keepdim=True) + _EPS)
        a = F.dropout(a, self.dropout) if self.dropout and self.training else a
        heads = torch.einsum("bhc,hdc->bhd", a @ source, weights[2])
        if biases is not None:
            heads = heads + a.sum(-1, keepdim=True) * biases[2]
        return self.wo(self.rho * heads.flatten(1)).unsqueeze(1).expand(-1, x.shape[1], -1)

    def weights(self, x: Tensor, context: Tensor | None = None, **keywords: Any) -> Tensor:
        """ρ times the centrality of each token, `(B, H, 1, M)`: to look at."""
        q, k, _ = self.qkv(x, context)
        return self.rho * centrality(q, k).unsqueeze(-2)
