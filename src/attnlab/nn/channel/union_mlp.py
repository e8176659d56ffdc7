"""Union of experts in the MLP: one MLP cut into slices, of which each token passes those that it chose."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_LENGTH, PERMUTATION_EQUIVARIANT, TOKENS, Card, register
from attnlab.nn.mechanism import Mechanism
from attnlab.patterns import Pattern
from attnlab.routing.experts import Lists, lists_of, released_lists


class ExpertGate(nn.Module):
    """Which `active` of `experts` each token chooses: x `(B, N, C)`.

        s = softmax(W x + b)        chosen: the `active` largest of s
        route = int(capacity · B) · chosen ⊙ s / (Σ over the batch of chosen ⊙ s + eps)

    Outputs are not multiplied by s, so nothing trains W and b, which stay as they begin; with `straight_through` the
    experts' outputs have the gradient of s. Source: arXiv 2503.02495.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        active: int,
        *,
        capacity: float = 1.0,
        eps: float = 1e-8,
        straight_through: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= active <= experts:
            raise ValueError(f"active must be between 1 and experts = {experts}, got {active}")
        self.active, self.capacity, self.eps, self.straight_through = active, capacity, eps, straight_through
        self.linear = nn.Linear(dim, experts).requires_grad_(straight_through)

    def scores(self, x: Tensor) -> Tensor:
        """s `(…, E)`, in at least float32."""
        return self.linear(x).to(torch.promote_types(x.dtype, torch.float32)).softmax(-1)

    def chosen(self, scores: Tensor) -> Tensor:
        """Which scores are among the `active` largest of their token: bool."""
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(self.active, -1).indices, True)

    def forward(self, x: Tensor) -> Tensor:
        """The route `(B, N, E)`: it orders tokens by how much they, of all in the batch at their place, want it."""
        scores = self.scores(x)
        kept = scores * self.chosen(scores)
        return kept / (kept.sum(0, keepdim=True) + self.eps) * int(self.capacity * len(x))

    def strength(self, scores: Tensor, lists: Lists) -> Tensor:
        """1 for each listed token, `(E, B, L, 1)`, with the gradient of its score."""
        listed = scores.permute(2, 0, 1).gather(-1, lists.taken).unsqueeze(-1)
        return 1 + listed - listed.detach()


def gather(x: Tensor, lists: Lists) -> Tensor:
    """Each expert's tokens `(E, B·L, C)` of `x (B, N, C)`."""
    taken = x.flatten(0, 1).index_select(0, lists.flat(lists.taken, x.shape[1]))
    return taken.unflatten(0, (len(lists.places), -1))


def scatter(parts: Tensor, lists: Lists, x: Tensor) -> Tensor:
    """Sum of the experts' outputs `(E, B·L, C)`, which are written to, each at its tokens, as `x (B, N, C)`."""
    if lists.filled is not None:
        parts.masked_fill_(~lists.filled.reshape(*parts.shape[:2], 1), 0.0)
    places = lists.flat(lists.places, x.shape[1])
    return torch.zeros_like(x).flatten(0, 1).index_add(0, places, parts.flatten(0, 1)).view_as(x)


def sliced(experts: int, inner: int, outer: int) -> nn.Parameter:
    """Weights of all experts, (E, inner, outer), with the variance of Xavier's normal initialisation in each."""
    return nn.Parameter(torch.randn(experts, inner, outer) * (2 / (inner + outer)) ** 0.5)


def check_variant(variant: str, release_order: bool = False) -> None:
    if variant not in ("paper", "release"):
        raise ValueError(f"variant must be 'paper' or 'release', got {variant!r}")
    if release_order and variant == "paper":
        raise ValueError("release_order=True goes with variant='release'")


@register(
    Card(
        name="union_mlp",
        title="Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer",
        paper="2503.02495",
        family="channel",
        kind=TOKENS,
        capabilities=ANY_LENGTH | PERMUTATION_EQUIVARIANT,
        cost="N · active / experts, if balanced",
        sample=dict(hidden=16, experts=4, active=2),
        exports="how many tokens each expert gets is read from data",
    )
)
class UnionMLP(Mechanism):
    """An MLP cut into `experts` slices of its inner width; each token passes the `active` ones that its gate chose.

        y = Σ over the chosen e of W2_e gelu(W1_e x + b1_e) + b2_e          W1_e (C, hidden / E), W2_e (hidden / E, C)

    x (B, N, C) → (B, N, C), without residual and norm. With every expert chosen this is one dense MLP with the bias
    Σ b2_e. Cost: active/experts of that MLP if choices are balanced, as every slice computes as many tokens as the
    busiest. Nothing trains the choice by itself: see `ExpertGate`.
    Source: arXiv 2503.02495 (YujiaoYang-work/UoE).

    Args:
        hidden: inner width of all experts together; 4 C if None.
        select: "tokens" each choose for themselves; or a whole "sequence" of exactly `length` tokens chooses at once,
            by a gate that sees all its tokens one after another.
        variant: "release" does as the authors' code: all lists of tokens are as long as the longest in the batch, and
            filled up with tokens that did not choose and yet get the expert's output. So a token's output depends on
            later tokens and on other sequences. "paper", the default, adds what was chosen and no more.
        share: with "release", lists have this share of a sequence's tokens, and those that want an expert least are
            left out, on which the paper is silent: 0.5 is what the authors' MLP does by its own dispatch.
        release_order: with "release", tokens are read by falling route and written to ascending places, so outputs end
            up at other tokens: an error of the authors' other dispatch, whose lists hold all who chose.
        straight_through, capacity, eps: of `ExpertGate`.
        causal: no difference, as tokens are not mixed.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: int | None = None,
        experts: int = 4,
        active: int = 2,
        select: Literal["tokens", "sequence"] = "tokens",
        length: int | None = None,
        variant: Literal["paper", "release"] = "paper",
        share: float | None = None,
        release_order: bool = False,
        straight_through: bool = False,
        capacity: float = 1.0,
        eps: float = 1e-8,
        dropout: float = 0.0,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        hidden = 4 * dim if hidden is None else hidden
        if experts < 1 or hidden % experts or not hidden:
            raise ValueError(f"experts must be at least 1 and divide hidden = {hidden}, got {experts}")
        if select not in ("tokens", "sequence"):
            raise ValueError(f"select must be 'tokens' or 'sequence', got {select!r}")
        if (select == "sequence") != (length is not None):
            raise ValueError(f"length goes with select='sequence', and only with it; got {length} with {select!r}")
        if select == "sequence" and variant == "release":
            raise ValueError("variant='release' goes with select='tokens'")
        check_variant(variant, release_order)
        if share is not None and (variant == "paper" or not 0 < share <= 1):
            raise ValueError(f"share must lie in (0, 1] and goes with variant='release', got {share} with {variant!r}")
        self.length, self.variant, self.dropout = length, variant, dropout
        self.share, self.release_order = share, release_order
        self.gate = ExpertGate(
            dim * (length or 1), experts, active, capacity=capacity, eps=eps, straight_through=straight_through
        )
        self.w1, self.b1 = (
            sliced(experts, dim, hidden // experts),
            nn.Parameter(torch.zeros(experts, hidden // experts)),
        )
        self.w2, self.b2 = sliced(experts, hidden // experts, dim), nn.Parameter(torch.zeros(experts, dim))

    def lists(self, x: Tensor) -> tuple[Lists, Tensor]:
        """Each expert's tokens of `x (B, N, C)`, and the scores `(B, N, E)` by which they came to it."""
        if self.variant == "release":
            route = self.gate(x)
            return released_lists(route, share=self.share, release_order=self.release_order), self.gate.scores(x)
        if self.length is None:
            scores = self.gate.scores(x)
        elif x.shape[1] != self.length:
            raise ValueError(f"x must have {self.length} tokens, the length of the gate, got {x.shape[1]}")
        else:
            scores = self.gate.scores(x.flatten(1)).unsqueeze(1).expand(-1, x.shape[1], -1)
        return lists_of(self.gate.chosen(scores)), scores

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
        self.check(x)
        # Tokens that choose for themselves are one list for all sequences: the fewer lists, the less is filled up.
        tokens = x.reshape(1, -1, self.dim) if self.variant == "paper" and self.length is None else x
        lists, scores = self.lists(tokens)
        inner = F.gelu(torch.baddbmm(self.b1.unsqueeze(1), gather(tokens, lists), self.w1))
        parts = torch.baddbmm(self.b2.unsqueeze(1), F.dropout(inner, self.dropout, self.training), self.w2)
        if self.gate.straight_through:
            parts = parts * self.gate.strength(scores, lists).flatten(1, 2).to(parts.dtype)
        return scatter(parts, lists, tokens).view_as(x)
