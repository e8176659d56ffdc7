"""Pointer networks: from a set of points to a sequence of positions in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnlab.cards import OPERATOR, Card, register
from attnlab.models.pointing.answering import Answering, Decoded, State, permutation, unused
from attnlab.nn.cross.pointer import Pointer

__all__ = ["Decoded", "PointerNetwork", "permutation", "unused"]


@register(
    Card(
        name="pointer_network",
        system="ptrnet",
        title="Pointer Networks",
        paper="1506.03134",
        family="cross",
        kind=OPERATOR,
        cost="M N",
        growth=2.0,
        sample=dict(dim=16),
        compiles="torch.compile does not take nn.LSTM",
    )
)
class PointerNetwork(Answering):
    """Answers about a set of points by pointing at them, one after the other, at any number of points.

        e = LSTM(points)                                       d_i = LSTM(d_{i−1}, point chosen at i − 1)
        u_ij = v · tanh(W1 e_j + W2 d_i)                       p(C_i = j | C_<i, points) = softmax_j u_ij

        log p (B, T, N + 1) = net(points (B, N, in_channels), targets (B, T))        with the answers so far given
        positions (B, T), log p (B,) = net.decode(points, beam=4, allowed=permutation)

    Candidate N is the end, with a learned e of its own; targets behind it are −1. The decoder starts from the encoder's
    last state and a learned first input. Cost: 16 (N + T) dim² + 3 T N dim. Source: arXiv 1506.03134.

    Args:
        embedding: a linear layer to so many channels before both LSTMs; None feeds the points themselves.
        end: whether there is an end; without it there are N candidates, and an answer of N positions.
        bias: biases in the pointer's projections.
        blend: joins Σ_j p_ij W1 e_j to d_i, tanh(W [blend, d_i]), before it goes on to the next step; not in the
            paper. Such a decoder runs step by step in training too.
        layers, bidirectional: of the encoder, each direction dim / 2 wide; the decoder has one layer.
    """

    def __init__(
        self,
        *,
        dim: int = 512,
        in_channels: int = 2,
        embedding: int | None = None,
        end: bool = True,
        bias: bool = False,
        blend: bool = False,
        layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            dim=dim, in_channels=in_channels, embedding=embedding, ends=end, layers=layers, bidirectional=bidirectional,
            dropout=dropout,
        )  # fmt: skip
        self.pointer = Pointer(dim, bias=bias)
        self.end = nn.Parameter(torch.empty(dim)) if end else None
        self.blend = nn.Linear(2 * dim, dim) if blend else None
        self.recurrent = blend
        self._start_small()

    def remember(self, context: Tensor) -> Tensor:
        """The pointer's keys (B, N, or N + 1 with the end, dim)."""
        if self.end is not None:
            context = torch.cat((context, self.end.expand(len(context), 1, -1)), 1)
        return self.pointer.keys(context)

    def score(self, out: Tensor, memory: Tensor, n: int) -> Tensor:
        return self.pointer.score(out, memory)

    def step(self, given: Tensor, state: State, memory: Tensor, n: int, allowed: Tensor | None) -> tuple[Tensor, State]:
        log_p, state = super().step(given, state, memory, n, allowed)
        if self.blend is not None:
            blend = (log_p.exp().unsqueeze(1) @ memory).squeeze(1)
            state = State(self.blend(torch.cat((blend, state.h[0]), -1)).tanh().unsqueeze(0), state.c)
        return log_p, state
