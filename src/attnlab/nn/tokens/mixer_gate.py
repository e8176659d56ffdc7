"""Dynamic gating by token mixing (NiNformer): a small MLP-Mixer says how much of each token's channels passes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.mechanism import Mechanism


class FeedForward(nn.Module):
    """fc2(gelu(fc1(x))) over the last axis, each layer dropped out."""

    def __init__(self, dim: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class MixerBlock(nn.Module):
    """A block of MLP-Mixer (arXiv 2105.01601): (B, N, C) to the same, for the one N that it was built for.

    x = x + token_mlp(norm1(x)ᵀ)ᵀ;  x = x + channel_mlp(norm2(x))        both of `hidden` channels
    """

    def __init__(self, dim: int, tokens: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.token_mlp = nn.LayerNorm(dim), FeedForward(tokens, hidden, dropout=dropout)
        self.norm2, self.channel_mlp = nn.LayerNorm(dim), FeedForward(dim, hidden, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mlp(self.norm1(x).mT).mT
        return x + self.channel_mlp(self.norm2(x))


@register(
    Card(
        name="mixer_gate",
        title="NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
        paper="2403.02411",
        system="ninformer",
        family="tokens",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF,
        cost="N",
        sample={"tokens": 24, "hidden": 20},
    )
)
class MixerGate(Mechanism):
    """Lets each token's channels through by a gate that an MLP-Mixer computes from all tokens, instead of attention.

        y = (W x) ⊙ mixer(x)                mixer: `MixerBlock`, its residual path kept; no activation bounds the gate

    (B, N, C) to the same, not causal. The token MLP has weights for exactly `tokens` tokens, and so permuting tokens
    does not permute the output. Cost: 4·hidden·N·C multiplications for both MLPs and N·C² for W: linear in N while
    `hidden` stays. Source: arXiv 2403.02411 (Abdullah-88/NiNformer).
    """

    def __init__(
        self, dim: int, *, tokens: int, hidden: int | None = None, dropout: float = 0.0, causal: bool = False
    ) -> None:
        super().__init__(dim)
        if causal:
            raise ValueError("causal must be False: the token MLP sees all tokens")
        hidden = 2 * dim if hidden is None else hidden
        for name, value in (("tokens", tokens), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.tokens = tokens
        self.proj = nn.Linear(dim, dim)
        self.mixer = MixerBlock(dim, tokens, hidden, dropout=dropout)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: object = None,
        pattern: object = None,
        state: object = None,
    ) -> Tensor:
        self.refuse(context=context, pattern=pattern, state=state)
        self.check(x)
        if x.shape[1] != self.tokens:
            raise ValueError(f"x must have the {self.tokens} tokens that the gate was built for, got {x.shape[1]}")
        return self.proj(x) * self.mixer(x)
