"""Union of experts in attention: each head sees only the tokens that chose it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, NONCAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import Cache
from attnlab.nn.channel.union_mlp import ExpertGate, check_variant, gather, scatter, sliced
from attnlab.nn.mechanism import Mechanism, check_heads
from attnlab.patterns import Causal, Pattern
from attnlab.positions import Position, Rotary
from attnlab.problem import Bias
from attnlab.routing.experts import Lists, lists_of, released_lists


class OwnTokens(Cache):
    """Keys, not turned yet, and values of each head's own tokens: `(H, B, L, D)`, shorter lists filled up before."""

    filled: Tensor | None = None  # (H, B, L)

    def numbers(self) -> int:
        return 0 if self.filled is None or self._k is None else 2 * int(self.filled.sum()) * self._k.shape[-1]

    def extend(self, k: Tensor, v: Tensor, filled: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Add a piece whose lists are filled up behind: all keys, values, which count, and how many are older."""
        before = 0
        if self._k is not None and self._v is not None and self.filled is not None:
            before = self._k.shape[2]
            k, v, filled = (torch.cat(p, 2) for p in ((self._k, k), (self._v, v), (self.filled, filled)))
        most = int(filled.sum(-1).max())
        # What fills up comes first, and all tokens behind it keep their order.
        kept = filled.byte().argsort(dim=-1, stable=True)[..., filled.shape[-1] - most :]
        self.filled = filled.gather(2, kept)
        self._k, self._v = (t.gather(2, kept[..., None].expand(-1, -1, -1, t.shape[-1])) for t in (k, v))
        return k, v, filled, before


@register(
    Card(
        name="union_attention",
        title="Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer",
        paper="2503.02495",
        family="sparse",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N² · (active / heads)², if balanced",
        state="2 * gate.active * head_dim * N",
        sample=dict(heads=4),
        compiles="how many tokens each head gets is read from data",
        exports="how many tokens each head gets is read from data",
    )
)
class UnionAttention(Mechanism):
    """Multi-head attention whose heads are experts: a head attends among the tokens that chose it, and writes to them.

        y_i = Σ over the heads h that i chose of Wo_h attend(q_h, k_h, v_h over the tokens that chose h) + bo_h

    x (B, N, C) → (B, N, C), without residual and norm. A head numbers its own tokens 0, 1, 2, … for the rotary
    position. With every head chosen this is multi-head attention. If choices are balanced, projections cost
    active/heads of that, and scores the square of it. Nothing trains the choice by itself: see `ExpertGate`.

    A token chooses for itself alone, so with `causal` no token has any influence on earlier ones. In the authors' code
    it has: see `variant`. Streams with the keys and values of each head's own tokens. Source: arXiv 2503.02495
    (YujiaoYang-work/UoE).

    Args:
        active: heads that each token chooses; half of them if None.
        position: turns q and k; `Rotary` if None. Pass `Position()` for none.
        variant: "release" does as the authors' code: each head's list of tokens is as long as the longest in the batch,
            filled up with tokens that did not choose it, and those see and are seen; queries that follow a memory are
            turned as if they began the text. "paper", the default, lets only tokens that chose a head into it.
        straight_through, capacity, eps: of `ExpertGate`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        active: int | None = None,
        position: Position | None = None,
        variant: Literal["paper", "release"] = "paper",
        straight_through: bool = False,
        capacity: float = 1.0,
        eps: float = 1e-8,
        dropout: float = 0.0,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        check_variant(variant)
        _, self.head_dim = check_heads(dim, heads)
        self.heads, self.variant, self.dropout = heads, variant, dropout
        self.position = Rotary(self.head_dim) if position is None else position
        active = max(1, heads // 2) if active is None else active
        self.gate = ExpertGate(dim, heads, active, capacity=capacity, eps=eps, straight_through=straight_through)
        self.wqkv, self.bqkv = (
            sliced(heads, dim, 3 * self.head_dim),
            nn.Parameter(torch.zeros(heads, 3 * self.head_dim)),
        )
        self.wo, self.bo = sliced(heads, self.head_dim, dim), nn.Parameter(torch.zeros(heads, dim))

    def lists(self, x: Tensor, *, last: bool = False) -> tuple[Lists, Tensor]:
        """Each head's tokens of `x (B, N, C)`, and the scores `(B, N, H)` by which they came to it."""
        scores = self.gate.scores(x)
        if self.variant == "release":
            return released_lists(self.gate(x)), scores
        return lists_of(self.gate.chosen(scores), last=last), scores

    def project(self, x: Tensor, lists: Lists, start: int = 0) -> Tensor:
        """q, k and v (or from channel `start` on) of each head's tokens: `(H, B, L, 3 D − start)`."""
        found = torch.baddbmm(self.bqkv[:, None, start:], gather(x, lists), self.wqkv[:, :, start:])
        return found.unflatten(1, lists.places.shape[1:])

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> OwnTokens:
        if not self.causal or self.variant == "release":
            raise ValueError("streaming needs causal=True and variant='paper': a release's lists change with the text")
        return OwnTokens(self.owner(batch))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: OwnTokens | None = None,
        memory: Tensor | None = None,
    ) -> Any:
        """`memory (B, M, C)` are tokens before x that are seen as well, each head those that choose it."""
        self.refuse(context=context, pattern=pattern, memory=None if state is None else memory)
        self.check(x)
        if state is not None:
            self.check_state(state, OwnTokens, len(x))
        lists, scores = self.lists(x)
        q, k, v = self.project(x, lists).split(self.head_dim, -1)
        filled: Tensor | None
        if state is not None and lists.filled is not None:
            k, v, filled, before = state.extend(k, v, lists.filled)
            q, k = self.position(q, q, before)[0], self.position(k, k)[1]
        elif memory is None:
            (q, k), before, filled = self.position(q, k), 0, lists.filled
        else:
            self.check(memory)
            older, _ = self.lists(memory, last=True)
            old_k, old_v = self.project(memory, older, self.head_dim).chunk(2, -1)
            before = old_k.shape[2]
            first = self.position(q, q)[0] if self.variant == "release" else None
            q, k = self.position(q, k, before)
            q = q if first is None else first
            k, v = torch.cat((self.position(old_k, old_k)[1], k), 2), torch.cat((old_v, v), 2)
            filled = None
            if older.filled is not None and lists.filled is not None:
                filled = torch.cat((older.filled, lists.filled), 2)
        where, bias = self._seen(q, before, filled)
        out = attend(q, k, v, pattern=where, bias=bias, dropout=self.dropout if self.training else 0.0)
        parts = torch.baddbmm(self.bo.unsqueeze(1), out.flatten(1, 2), self.wo)
        if self.gate.straight_through:
            parts = parts * self.gate.strength(scores, lists).flatten(1, 2).to(parts.dtype)
        y = scatter(parts, lists, x)
        return y if state is None else (y, state)

    def _seen(self, q: Tensor, before: int, filled: Tensor | None) -> tuple[Pattern | None, Bias | None]:
        """Which of a head's keys its queries see, `before` of them being older than the first query."""
        where = Causal().starting_at(before) if self.causal else None
        # What fills up stands behind all tokens, where no token looks if it looks back only.
        if filled is None or (self.causal and not before) or bool(filled.all()):
            return where, None
        # Finite, for a head that no token of a sequence chose: what it makes of nothing is dropped.
        hidden = torch.zeros(filled.shape, dtype=q.dtype, device=q.device)
        return where, hidden.masked_fill_(~filled, torch.finfo(q.dtype).min / 2).unsqueeze(2)
