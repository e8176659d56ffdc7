"""Titans' neural memory: a small network per head, trained on the text while the text is read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import Owner
from attnlab.nn.linear.kda import unit
from attnlab.nn.linear.short_conv import ShortConv
from attnlab.nn.mechanism import Mechanism, check_heads, join_heads, split_heads
from attnlab.nn.memory.deep import DeepMemory, Weights, course
from attnlab.patterns import Pattern


class MemoryState(NamedTuple):
    """What a neural memory is after some tokens."""

    weights: Weights
    momentum: Weights
    anchor: Weights  # the weights at the start of the chunk, where gradients are taken
    chunk: int  # its length
    place: int  # and how many of its tokens have been read
    past_q: Tensor | None  # the last inputs of the convolutions
    past_kv: Tensor | None
    owner: Owner


def pieces(place: int, length: int, chunk: int) -> list[int]:
    """Lengths that cut `length` tokens, the first of them at `place` within its chunk, at the ends of chunks."""
    first = min(chunk - place, length)
    whole, rest = divmod(length - first, chunk)
    return [first, *[chunk] * whole, *([rest] if rest else [])]


@register(
    Card(
        name="neural_memory",
        title="Titans: Learning to Memorize at Test Time",
        paper="2501.00663",
        system="titans",
        family="memory",
        kind=TOKENS,
        capabilities=CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N",
        growth=1.0,
        state="3 * memory.numbers + 3 * (taps - 1) * heads * head_dim",
        sample=dict(heads=4, chunk=13),
    )
)
class NeuralMemory(Mechanism):
    """A network M per head that learns, token by token, to map the keys of a text to its values (Titans' LMM).

        q, k, v = silu(conv(W x)), q and k of unit length      θ, η, α = σ(Wr x) per head, θ times max_rate
        g_t = ∇|M(k_t) − v_t|²,  S_t = η_t S_{t−1} − θ_t g_t / √(1 + |g_t|²/m²)     surprise, with momentum
        M_t = (1 − α_t) M_{t−1} + S_t                          and forgetting
        y_t = Wo (RMSNorm(M_t(q_t)) ⊙ σ(Wg x_t))

    x `(B, N, C)` → `(B, N, C)`. The gradient is taken at the weights of the start of the chunk, so that a chunk is a
    few matrix products (`DeepMemory`): time O(N · (|M| + chunk · C)). Streams with three sets of weights, whatever the
    length: 3·H·|M| numbers, and the convolutions' 3·(taps − 1)·H·D. Causal only. Source: arXiv 2501.00663, section 3.

    Args:
        dim: C.
        heads, head_dim: networks, and their width D (C/H if None).
        depth, expansion: M's layers, and the width between them over D. depth=1 is a matrix, as in the delta rule.
        chunk: tokens whose gradients are taken at the same weights. Larger is faster, and learns less from each token.
        max_rate: the largest θ; 1/chunk if None, as a chunk of equal keys overshoots beyond (1 − η)/chunk.
        max_grad_norm: m; √D if None, math.inf for the paper's equation, with which an M of two layers explodes once its
            steps are too long. It bounds M, not backward through it: over thousands of tokens of such steps gradients
            can still grow large.
        momentum: False for η = 0.
        residual: M has a residual and a norm, see `DeepMemory`.
        conv: taps of the short convolutions after the projections; None for none.
    """

    causal_only = "its state runs along the tokens"

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        depth: int = 2,
        expansion: float = 2.0,
        chunk: int = 16,
        max_rate: float | None = None,
        max_grad_norm: float | None = None,
        momentum: bool = True,
        residual: bool = False,
        conv: int | None = 4,
        norm_eps: float = 1e-5,
        causal: bool = True,
    ) -> None:
        super().__init__(dim, causal=causal)
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        if max_rate is not None and max_rate < 0:
            raise ValueError(f"max_rate must be 0 or more, got {max_rate}")
        self.heads, self.head_dim = heads, check_heads(dim, heads, None, head_dim)[1]
        self.chunk, self.max_rate, self.momentum = chunk, 1 / chunk if max_rate is None else max_rate, momentum
        inner, self.taps = heads * self.head_dim, conv or 1
        self.wq = nn.Linear(dim, inner, bias=False)
        self.wkv = nn.Linear(dim, 2 * inner, bias=False)
        self.conv_q = None if conv is None else ShortConv(inner, conv)
        self.conv_kv = None if conv is None else ShortConv(2 * inner, conv)
        bound = self.head_dim**0.5 if max_grad_norm is None else max_grad_norm
        self.memory = DeepMemory(
            heads, self.head_dim, depth=depth, expansion=expansion, residual=residual, max_grad_norm=bound
        )
        self.rates = nn.Linear(dim, (3 if momentum else 2) * heads)
        self.norm = nn.RMSNorm(self.head_dim, eps=norm_eps)
        self.gate = nn.Linear(dim, inner, bias=False)
        self.wo = nn.Linear(inner, dim, bias=False)
        with torch.no_grad():  # at first half the rate, half the momentum, and a memory of some 150 tokens
            self.rates.weight.mul_(0.1)
            self.rates.bias.zero_()[-heads:] = -5.0

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MemoryState:
        device, dtype = device or self.wo.weight.device, dtype or self.wo.weight.dtype
        weights = self.memory.initial(batch, torch.promote_types(dtype, torch.float32), device)
        past_q, past_kv = (
            None if c is None else c.initial_state(batch, device=device, dtype=dtype)
            for c in (self.conv_q, self.conv_kv)
        )
        momentum = tuple(map(torch.zeros_like, weights))
        return MemoryState(weights, momentum, weights, self.chunk, 0, past_q, past_kv, self.owner(batch))

    def queries(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """q `(B, H, N, D)` in at least float32, and the convolution's last inputs."""
        q = self.wq(x)
        if self.conv_q is not None:
            q, past = self.conv_q(q, past)
        return unit(_wide(split_heads(silu(q), self.heads))), past

    def recall(self, x: Tensor, weights: Weights, past: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What a memory with these weights says to x `(B, N, C)`, unwritten; and the convolution's state."""
        q, past = self.queries(x, past)
        return self._say(self.memory.read(q, weights), x), past

    def _say(self, heads: Tensor, x: Tensor) -> Tensor:
        return self.wo(join_heads(self.norm(heads.to(x.dtype))) * self.gate(x).sigmoid())

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: MemoryState | None = None,
    ) -> Any:
        self.check(x)
        self.refuse(context=context, pattern=pattern)
        before = self.initial_state(len(x), dtype=x.dtype) if state is None else state
        self.check_state(before, MemoryState, len(x))
        weights, momentum, anchor, chunk, place, past_q, past_kv, owner = before
        self.memory.check(weights, len(x))
        q, past_q = self.queries(x, past_q)
        kv = self.wkv(x)
        if self.conv_kv is not None:
            kv, past_kv = self.conv_kv(kv, past_kv)
        k, v = (_wide(split_heads(t, self.heads)) for t in silu(kv).chunk(2, -1))
        raw = _wide(self.rates(x)).transpose(1, 2).split(self.heads, 1)
        rate, keep = self.max_rate * raw[0].sigmoid().unsqueeze(-1), logsigmoid(-raw[-1])
        push = logsigmoid(raw[1]) if self.momentum else torch.full_like(keep, -torch.inf)
        sizes, out = pieces(place, x.shape[1], self.chunk), []
        cut = zip(*(t.split(sizes, 2) for t in (q, unit(k), v, rate, keep, push)), strict=True)
        for size, (q_, k_, v_, rate_, keep_, push_) in zip(sizes, cut, strict=True):
            way = course(keep_, push_)
            y, weights, momentum = self.memory.step(q_, k_, v_, rate_, way, anchor, weights, momentum)
            out.append(y)
            place = (place + size) % self.chunk
            anchor = anchor if place else weights
        y = self._say(torch.cat(out, 2), x)
        return y if state is None else (y, MemoryState(weights, momentum, anchor, chunk, place, past_q, past_kv, owner))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
