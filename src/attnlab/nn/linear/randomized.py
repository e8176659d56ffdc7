"""LARA: linear randomised attention, random features drawn around landmarks and weighed by each query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnlab.cards import ANY_LENGTH, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.linear.nystrom import segment_means
from attnlab.nn.mechanism import check_keep, check_turns
from attnlab.nn.multihead import MultiHead


@register(
    Card(
        name="lara",
        title="Linear Complexity Randomized Self-attention Mechanism",
        paper="2204.04667",
        family="linear",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_LENGTH,
        cost="N c",
        growth=1.0,
        sample=dict(heads=4, landmarks=16),
    )
)
class RandomizedAttention(MultiHead):
    """Attention by c random features, each drawn near where a part of the tokens lies, as importance sampling has it.

        μ_c = q̄_c + k̄_c,  w_c = μ_c + noise                          q̄, k̄ the means of c runs of tokens
        V_c = Σ_n softmax_n(κ(k_n, w_c)) v_n                           κ(x, w) = (w·x − |x|²/2)/√D
        y_n = Wo · Σ_c softmax_c( μ_c·q_n/√D + κ(q_n, w_c) + log Σ_m e^{κ(k_m, w_c)} − κ(μ_c, w_c) ) V_c

    x (B, N, C) → (B, N, C), O(N · C · c). The noise, one Gaussian vector for each landmark, is drawn while training;
    in evaluation there is none. Up to c tokens each is its own landmark. Source: arXiv 2204.04667
    (HKUNLP/efficient-attention; Shark-NLP/CAB).

    Args:
        landmarks: c. position: turns q and k, before the means.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        landmarks: int = 16,
        bias: bool = True,
        causal: bool = False,
        position: Any = None,
    ) -> None:
        if causal:
            raise ValueError("causal must be False: landmarks are made of all tokens")
        if landmarks < 1:
            raise ValueError(f"landmarks must be at least 1, got {landmarks}")
        check_turns(position)
        super().__init__(dim, heads=heads, bias=bias, position=position)
        self.landmarks = landmarks

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Any = None,
        state: Any = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """As every mechanism; `keep` (B, N) is False where a token is padding: no query sees it as a key."""
        self.check(x)
        self.refuse(context=context, pattern=pattern, state=state)
        q, k, v = self.project(x, grid=grid if self.on_grid else None)
        if keep is not None:  # padding is in no landmark either, other than as zeros
            q, k = q * check_keep(keep, q), k * check_keep(keep, k)
        scale, segments = self.head_dim**-0.5, min(self.landmarks, x.shape[1])
        centres = segment_means(q, segments) + segment_means(k, segments)
        drawn = centres + torch.randn_like(centres) if self.training else centres

        def half(t: Tensor) -> Tensor:
            return t.square().sum(-1).unsqueeze(-2) / 2

        of_keys = scale * (drawn @ k.mT - half(k))  # (B, H, c, N)
        if keep is not None:
            of_keys = of_keys.masked_fill(~check_keep(keep, k).mT, -torch.inf)
        own = scale * ((drawn * centres).sum(-1) - centres.square().sum(-1) / 2)
        mixed = of_keys.softmax(-1) @ v
        # The |q|²/2 of κ(q, w) is the same for every c, and so nothing to the softmax over them.
        logits = scale * (centres + drawn) @ q.mT + (of_keys.logsumexp(-1) - own).unsqueeze(-1)
        return self.merge(logits.softmax(-2).mT @ mixed)
