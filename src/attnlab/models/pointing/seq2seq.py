"""What pointer networks are measured against: answers from a dictionary of positions that is fixed before training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnlab.cards import OPERATOR, Card, register
from attnlab.models.pointing.answering import Answering
from attnlab.nn.cross.pointer import Pointer


@register(
    Card(
        name="position_dictionary",
        title="Pointer Networks",
        paper="1506.03134",
        family="cross",
        kind=OPERATOR,
        cost="M N",
        growth=2.0,
        sample=dict(dim=16, most=8),
        compiles="torch.compile does not take nn.LSTM",
    )
)
class PositionDictionary(Answering):
    """Sequence to sequence, without or with content attention: the baselines of the pointer network's paper.

        u_ij = v · tanh(W1 e_j + W2 d_i)        a_i = softmax u_i        d'_i = Σ_j a_ij e_j
        p(C_i | C_<i, points) = softmax(W [d_i, d'_i])                   over `most` positions and the end

    Called, trained and decoded as `PointerNetwork`, for N ≤ most points; of the dictionary only the first N positions
    and the end are candidates. Cost: 16 (N + T) dim² + 3 T N dim + 2 T dim · most. Source: arXiv 1506.03134.

    Args:
        most: how many positions there are words for.
        attention: whether the points' states are looked at; without, W has d_i alone.
    """

    def __init__(
        self,
        *,
        most: int,
        dim: int = 512,
        in_channels: int = 2,
        attention: bool = True,
        embedding: int | None = None,
        layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        if most < 1:
            raise ValueError(f"most must be at least 1, got {most}")
        super().__init__(
            dim=dim, in_channels=in_channels, embedding=embedding, ends=True, layers=layers,
            bidirectional=bidirectional, dropout=dropout,
        )  # fmt: skip
        self.most = most
        self.attention = Pointer(dim) if attention else None
        self.words = nn.Linear(2 * dim if attention else dim, most + 1)
        self._start_small()

    def remember(self, context: Tensor) -> Tensor:
        """The keys and, beside them, the states that are looked at (B, N, 2 dim); the states alone without either."""
        if context.shape[1] > self.most:
            raise ValueError(f"points must be at most {self.most}, as the dictionary has, got {context.shape[1]}")
        return context if self.attention is None else torch.cat((self.attention.keys(context), context), -1)

    def score(self, out: Tensor, memory: Tensor, n: int) -> Tensor:
        if self.attention is not None:
            keys, context = memory.chunk(2, -1)
            seen = self.attention.score(out, keys).softmax(-1) @ context
            out = torch.cat((out, seen), -1)
        scores = self.words(out)
        return torch.cat((scores[..., :n], scores[..., -1:]), -1)
