"""Where attention sinks are: how much each token receives, how often that is a sink, and the norms that betray one."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab.cards import LENS, Card, register

_TITLE, _PAPER = "When Attention Sink Emerges in Language Models: An Empirical View", "2410.10781"


def importance(weights: Tensor) -> Tensor:
    """What each key receives from a query that can see it, on average: causal weights `(…, T, T)` → `(…, T)`.

        α_k = Σ_{i ≥ k} A_ik / (T − k)        k from 0

    Divided by the number of queries that see k, not by T. The last keys are seen by few queries, themselves among them,
    and look important without being a sink: judge the first ones. Source: arXiv 2410.10781.
    """
    _square(weights)
    size = weights.shape[-1]
    return weights.sum(-2) / torch.arange(size, 0, -1, device=weights.device, dtype=weights.dtype)


@register(Card(name="sink_rate", title=_TITLE, paper=_PAPER, family="lens", kind=LENS, cost="N²"))
def sink_rate(weights: Tensor, epsilon: float = 0.3) -> Tensor:
    """How many per cent of heads have a sink at each position: `(…, T, T)` of any samples, layers, heads → `(T)`.

        Sink_k = 100 · mean over the leading axes of [α_k > ε]        α of `importance`

    The rate of a model is that of its first token: entry 0, or the entry of the slot where maps have one (`kv_bias`).
    The paper takes ε = 0.3, T = 64 and 100 texts. For weights whose rows do not sum to one, decide: `row_shares` first
    is what the authors do, but where weights are tiny everywhere it still finds their largest; raw weights answer
    whether much is carried. Source: arXiv 2410.10781.
    """
    if not 0 <= epsilon:
        raise ValueError(f"epsilon must be 0 or more, got {epsilon}")
    above = (importance(weights) > epsilon).to(torch.promote_types(weights.dtype, torch.float32))
    return 100 * above.flatten(0, -2).mean(0)


def row_shares(weights: Tensor) -> Tensor:
    """Weights of any sign and sum as shares of their row, |w| / (Σ|w| + 1e-8): `(…, Nq, Nk)` → the same."""
    size = weights.abs()
    return size / (size.sum(-1, keepdim=True) + 1e-8)


def hidden_norms(hidden: Tensor) -> Tensor:
    """The L2 norm of each token's hidden state, `(S, L, T, C)` → `(L, T)`, mean over samples: a sink's is huge."""
    _axes("hidden", hidden, 4, "(samples, layers, tokens, channels)")
    return hidden.norm(dim=-1).mean(0)


def head_norms(heads: Tensor) -> Tensor:
    """The L2 norm of keys or values `(S, L, H, T, D)` → `(L, T)`, mean over samples and heads: a sink's is small."""
    _axes("heads", heads, 5, "(samples, layers, heads, tokens, channels)")
    return heads.norm(dim=-1).mean((0, 2))


def _axes(name: str, given: Tensor, axes: int, meaning: str) -> None:
    if given.dim() != axes or 0 in given.shape:
        raise ValueError(f"{name} must be {meaning}, not empty, got {tuple(given.shape)}")


def _square(weights: Tensor) -> None:
    if weights.dim() < 2 or weights.shape[-1] != weights.shape[-2] or 0 in weights.shape:
        raise ValueError(f"weights must be square matrices (…, T, T), not empty, got {tuple(weights.shape)}")
