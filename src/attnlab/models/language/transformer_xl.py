"""Transformer-XL with relative convolutional attention: a language model that reads in segments and remembers them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnlab.cards import CAUSAL_SELF, LM, Card, Size, register
from attnlab.models.skeletons.decoder import Decoder, DecoderState
from attnlab.models.skeletons.parts import MLP
from attnlab.nn.softmax.rcmha import RelativeConvolutionalAttention

_AUTHORS: dict[str, Any] = dict(vocabulary=65, dim=128, depth=6, heads=8, hidden=256)

# The characters of tiny Shakespeare at the authors' widths; without the convolution it is what their script trains.
SIZES = {
    "rcmha_char": Size(7_496_897, dict(_AUTHORS, memory=128)),
    "rmha_char": Size(7_495_745, dict(_AUTHORS, memory=128, taps=1)),
}


class SegmentBlock(nn.Module):
    """x = x + mixer(norm1(x), memory=norm1(memory)), then x = x + mlp(norm2(x)): `(B, N, C)` → the same."""

    def __init__(self, dim: int, mixer: nn.Module, mlp: nn.Module, dropout: float) -> None:
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(dim), mixer
        self.norm2, self.mlp = nn.LayerNorm(dim), mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        seen = None if memory is None else self.norm1(memory)
        x = x + self.dropout(self.mixer(self.norm1(x), memory=seen))
        return x + self.mlp(self.norm2(x))


@register(
    Card(
        name="transformer_xl",
        title="RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling",
        paper="2308.03429",
        system="rcmha",
        family="language",
        kind=LM,
        capabilities=CAUSAL_SELF,
        cost="N (N + memory)",
        sample=dict(vocabulary=40, dim=24, depth=2, heads=2, hidden=48, reach=32, memory=8),
        sizes=SIZES,
    )
)
class TransformerXL(Decoder):
    """A language model that reads a text in segments, each with the layers' inputs of what came before in sight.

        x = x + rcmha(norm x, memory = norm m)        x = x + W₂ relu(W₁ norm x)        m ← the last tokens of (m, x)

    `logits, state = model(ids, state)` reads one segment, with `state = model.initial_state(batch)` before the first.
    A state is a memory of the last `memory` tokens as they came into each layer, before the norm; no gradient flows
    into it. So a token sees depth × memory tokens back at the cost of N·(N + memory) per segment, and a text may be of
    any length. Positions are distances, so they mean the same in every segment. Convolved keys and values continue over
    the border of segments and queries start afresh: with taps > 1 how a text is cut changes the logits a little.
    `generate` reads the prompt as one segment and then token by token.

    Source: arXiv 2308.03429 (hermansh-id/rcmha), on Transformer-XL (1901.02860). The authors' script trains a model
    without the convolution, `taps=1`; the paper's has it.

    Args:
        vocabulary, dim, depth, heads: as for `Decoder`.
        hidden: the width inside the mlp.
        memory: how many tokens are remembered.
        reach, taps: of `RelativeConvolutionalAttention`; memory and segment together are at most `reach`.
        dropout: of attention weights, inside the mlp and on every path.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        dim: int,
        depth: int,
        heads: int = 8,
        hidden: int | None = None,
        memory: int = 128,
        reach: int = 4096,
        taps: int = 3,
        dropout: float = 0.0,
    ) -> None:
        if not 0 <= memory < reach:
            raise ValueError(f"memory must lie in 0 to reach − 1 = {reach - 1}, got {memory}")
        wide = 2 * dim if hidden is None else hidden

        def mixer(_: int) -> nn.Module:
            return RelativeConvolutionalAttention(
                dim, heads=heads, reach=reach, taps=taps, causal=True, dropout=dropout
            )

        super().__init__(
            vocabulary=vocabulary, dim=dim, depth=depth, heads=heads, mixer=mixer, mlp=lambda _: None, position="none"
        )
        plain: list[Any] = list(self.blocks)
        self.blocks = nn.ModuleList(
            SegmentBlock(dim, block.mixer, MLP(dim, wide, activation=nn.ReLU, dropout=dropout), dropout)
            for block in plain
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary)
        nn.init.normal_(self.embedding.weight)
        self.memory = memory

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> DecoderState:
        """An empty memory."""
        return DecoderState(self._signature, batch, 0, [None] * len(self.blocks))

    def forward(self, ids: Tensor, state: DecoderState | None = None, *, last: bool = False) -> Any:
        """Logits `(B, N, vocabulary)` of one segment, and its memory for the next if one is given."""
        self._check(ids, state)
        x = self.embedding(ids)
        for i, block in enumerate(self.blocks):
            memory = None if state is None else state.layers[i]
            if state is not None and self.memory:
                seen = x.detach() if memory is None else torch.cat((memory, x.detach()), 1)
                state.layers[i] = seen[:, -self.memory :]
            x = block(x, memory)
        if state is not None:
            state.length += ids.shape[1]
        logits = self.head(self.norm(x[:, -1:] if last else x))
        return logits if state is None else (logits, state)
