"""Relative convolutional attention: learned position keys, and queries, keys and values that saw their neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from attnlab.attend import attend
from attnlab.cards import CAUSAL_SELF, EXACT, NONCAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import KVCache
from attnlab.nn.decode import attend_one
from attnlab.nn.mechanism import join_heads, pattern_for
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern


class ConvolvedCache(KVCache):
    """A KV cache with the last projections before the convolution, which the next token's neighbourhood needs."""

    past: Tensor | None = None  # (B, taps − 1, 3, H, D)


def plain(dim: int, grid: tuple[int, ...]) -> RelativeConvolutionalAttention:
    """The limit in which it is softmax attention: each convolution passes its newest token on, tables are zero."""
    module = RelativeConvolutionalAttention(dim, heads=4, bias=False)
    nn.init.zeros_(module.taps_weight)
    nn.init.ones_(module.taps_weight[-1])
    nn.init.zeros_(module.taps_bias)
    return module


@register(
    Card(
        name="rcmha",
        title="RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling",
        paper="2308.03429",
        system="rcmha",
        family="softmax",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | CAUSAL_SELF | STREAMING | EXACT,
        cost="N²",
        growth=2.0,
        state="heads * head_dim * (2 * N + 3 * (taps - 1))",
        sample=dict(heads=4),
        limit=plain,
    )
)
class RelativeConvolutionalAttention(MultiHead):
    """Softmax attention with learned keys for distances, after a short causal convolution of q, k and v.

        q, k, v = conv(Wq x), conv(Wk x), conv(Wv x + b)        a depth-wise filter over time, the same for every head
        s_ij = ((q_i + c)·k_j + q_i·E_{i−j} + β_{i−j}) / √D      E, β, c learned, zero at first
        y = Wo softmax(s) v

    x (B, N, C) → (B, N, C), at most `reach` tokens at once. Cost O(N²): the position scores are one product of q with
    the table, skewed by a view instead of an index. The table holds 2·reach·(C + H) numbers, most of the parameters.
    Source: arXiv 2308.03429 (hermansh-id/rcmha; Transformer-XL's positions, Primer's convolution). The released
    training script builds the attention without the convolution; this is the class that has it, as the paper does.

    Args:
        reach: largest distance that has a position key (4096 in the authors' code).
        taps: of the convolution; 1 for none.
        bias: on values and on the output (queries and keys never have one).
        causal, dropout: as for `MultiHead`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        reach: int = 4096,
        taps: int = 3,
        bias: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, dropout=dropout, out_bias=bias)
        if reach < 1 or taps < 1:
            raise ValueError(f"reach and taps must be at least 1, got {reach} and {taps}")
        self.reach, self.taps = reach, taps
        self.value_bias = nn.Parameter(torch.zeros(dim)) if bias else None
        if taps > 1:
            bound = taps**-0.5  # as nn.Conv1d initialises such filters
            self.taps_weight = nn.Parameter(torch.empty(taps, 3, 1, self.head_dim).uniform_(-bound, bound))
            self.taps_bias = nn.Parameter(torch.empty(3, 1, self.head_dim).uniform_(-bound, bound))
        self.distance_key = nn.Parameter(torch.zeros(2 * reach, heads, self.head_dim))  # row reach − (i − j)
        self.distance_bias = nn.Parameter(torch.zeros(2 * reach, heads))
        self.query_bias = nn.Parameter(torch.zeros(heads, 1, self.head_dim))

    def convolve(self, x: Tensor, parts: slice = slice(0, 3), past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Those `parts` of q, k and v of tokens `(B, N, C)`: heads `(parts, B, H, N, D)`, and what is `past` next.

        `past` holds the projections of the tokens before x's first; without it there are none.
        """
        width = self.heads * self.head_dim
        y = linear(x, self.wqkv.weight[parts.start * width : parts.stop * width]).unflatten(
            -1, (-1, self.heads, self.head_dim)
        )
        if self.value_bias is not None and parts.stop == 3:
            bias = self.value_bias.view(1, self.heads, self.head_dim)
            y = y + pad(bias, (0, 0, 0, 0, y.shape[2] - 1, 0))
        seen = pad(y, (0,) * 6 + (self.taps - 1, 0)) if past is None else torch.cat((past, y), 1)
        n = y.shape[1]
        if self.taps > 1:
            weight, shift = self.taps_weight[:, parts], self.taps_bias[parts]
            y = torch.addcmul(shift, y, weight[-1])
            for j in range(self.taps - 1):
                y = torch.addcmul(y, seen[:, j : j + n], weight[j])
        return y.permute(2, 0, 3, 1, 4), seen[:, n:]

    def qkv(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        self.refuse(context=context)
        q, k, v = self.convolve(x)[0].unbind(0)
        return q, k, v

    def distance_scores(self, q: Tensor, keys: int, offset: int) -> Tensor:
        """(q_i·E_{i−j} + β_{i−j}) / √D, `(B, H, Nq, keys)`, for queries of which the first is key number `offset`."""
        n, last = q.shape[2], offset + q.shape[2] - 1
        if max(last + 1, keys) > self.reach:
            raise ValueError(f"at most reach = {self.reach} tokens have positions, got {max(last + 1, keys)}")
        # Rows of distance `last` down to −(keys − 1 − offset); a causal query needs none below 0.
        rows = slice(self.reach - last, self.reach + (1 if self.causal else keys - offset))
        table = torch.cat((self.distance_key[rows], self.distance_bias[rows].unsqueeze(-1)), -1).permute(1, 2, 0)
        scores = pad(q, (0, 1), value=1.0) * self.head_dim**-0.5 @ table.to(q.dtype)
        # Key j of query i stands in column n − 1 − i + j: reading rows that are one shorter moves each one further.
        scores = pad(scores, (0, n + keys - scores.shape[-1])).flatten(2)
        return scores[..., n - 1 : n - 1 + n * (n + keys - 1)].unflatten(-1, (n, -1))[..., :keys]

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        x: Tensor,
        pattern: Pattern | None = None,
        offset: int = 0,
        state: KVCache | None = None,
    ) -> Tensor:
        """Heads `(B, H, N, D)` from q, k, v of `convolve`."""
        bias, dropout = self.distance_scores(q, k.shape[2], offset), self.dropout if self.training else 0.0
        q = q + self.query_bias
        if state is not None and pattern is None and q.shape[2] == 1:
            return attend_one([(q, k, v)], bias=bias, dropout=dropout)
        return attend(q, k, v, pattern=pattern, bias=bias, dropout=dropout)

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ConvolvedCache:
        """An empty cache: 2·C numbers per token, and 3·C for each of taps − 1 tokens."""
        super().initial_state(batch, device=device, dtype=dtype)
        return ConvolvedCache(limit=self.reach, owner=self.owner(batch))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: Any = None,
        memory: Tensor | None = None,
    ) -> Any:
        """`(B, N, C)` → the same, or `(y, state)` with a state.

        `memory (B, M, C)` are tokens of the segment before (Transformer-XL): keys and values, through the convolution
        too, whereas queries start afresh. A state, instead, continues everything, as if there were no segments.
        """
        self.check(x)
        self.refuse(context=context, memory=memory if state is not None else None)
        if state is not None:
            self.check_state(state, ConvolvedCache, len(x))
        if memory is not None:
            if memory.dim() != 3 or memory.shape[::2] != x.shape[::2] or 0 in memory.shape:
                raise ValueError(f"memory must be ({len(x)}, M, {self.dim}), got {tuple(memory.shape)}")
            (q,), _ = self.convolve(x, slice(0, 1))
            (k, v), _ = self.convolve(torch.cat((memory, x), 1), slice(1, 3))
            offset = memory.shape[1]
        else:
            (q, k, v), past = self.convolve(x, past=None if state is None else state.past)
            offset = 0 if state is None else state.length
            if state is not None:
                k, v = state.append(k, v)
                state.past = past
        where = pattern_for(self.causal, pattern, offset, x.shape[1])
        y = self.wo(join_heads(self.mix(q, k, v, x=x, pattern=where, offset=offset, state=state)))
        return y if state is None else (y, state)
