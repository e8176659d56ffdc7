"""Attention without pairs: one score per key, the same for every query, and a running weighted mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from attnlab.cards import (
    ANY_LENGTH,
    CAUSAL_SELF,
    NONCAUSAL_SELF,
    PERMUTATION_EQUIVARIANT,
    STREAMING,
    TOKENS,
    Card,
    register,
)
from attnlab.nn.cache import Owner
from attnlab.nn.mechanism import join_heads
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern
from attnlab.scan import scan


class Means(NamedTuple):
    """The sums `(B, H, 1, D + 1)` over all keys so far, relative to the largest score `top (B, H, 1)` of them."""

    sums: Tensor
    top: Tensor
    owner: Owner


@register(
    Card(
        name="running_mean",
        title="Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
        paper="2510.11602",
        system="deconstruct_attn",
        family="linear",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | CAUSAL_SELF | STREAMING | ANY_LENGTH | PERMUTATION_EQUIVARIANT,
        cost="N",
        growth=1.0,
        state="heads * (head_dim + 2)",
        sample=dict(heads=4),
    )
)
class RunningMean(MultiHead):
    """The "non-approximate" attention of Deconstructing Attention: every query sees the same weighted mean of the past.

        e_j = SiLU(Wq x_j)·(Wk x_j)/√d        y_i = Wo · Σ_{j ≤ i} exp(e_j) v_j / Σ_{j ≤ i} exp(e_j)

    x (B, N, C) → (B, N, C), with the parameters of `MultiHead`; O(N) time. The state is one vector and two numbers per
    head: sums relative to the largest score so far, so that nothing overflows. Alone it models language badly, unless
    norms of q and k (`qk_norm`) keep the scores from growing; every second layer may be one at little loss.
    Source: arXiv 2510.11602, equation 7 (its appendix leaves out the 1/√d).
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        bias: bool = False,
        causal: bool = False,
        qk_norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__(dim, heads=heads, head_dim=head_dim, bias=bias, causal=causal, qk_norm=qk_norm)

    def initial_state(  # type: ignore[override]
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Means:
        super().initial_state(batch, device=device, dtype=dtype)
        weight = self.wqkv.weight
        dtype, device = torch.promote_types(dtype or weight.dtype, torch.float32), device or weight.device
        sums = torch.zeros(batch, self.heads, 1, self.head_dim + 1, dtype=dtype, device=device)
        top = torch.full((batch, self.heads, 1), -torch.inf, dtype=dtype, device=device)
        return Means(sums, top, self.owner(batch))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: Any = None,
    ) -> Any:
        self.check(x)
        self.refuse(context=context, pattern=pattern)
        if state is not None:
            self.check_state(state, Means, len(x))
        q, k, v = self.project(x)
        scores = (silu(q) * k).sum(-1) * self.head_dim**-0.5  # (B, H, N)
        if not self.causal:
            mean = (scores.softmax(-1).unsqueeze(2) @ v).expand_as(v)
            return self.wo(join_heads(mean))
        sums, top = (None, scores[..., :1].detach()) if state is None else state[:2]
        scores = scores.to(top.dtype)
        # The sums are kept relative to the largest score so far, which rises: each rise is a decay of the past.
        tops = torch.cat((top, scores.detach()), -1).cummax(-1).values
        decay = tops[..., :-1] - tops[..., 1:]
        keys = (scores - tops[..., 1:]).exp().unsqueeze(-1)
        values = pad(v, (0, 1), value=1.0).to(top.dtype)
        totals, last = scan(torch.ones_like(keys), keys, values, decay=decay, state=sums)
        y = self.wo(join_heads((totals[..., :-1] / totals[..., -1:]).to(x.dtype)))
        return y if state is None else (y, Means(last, tops[..., -1:], state.owner))
