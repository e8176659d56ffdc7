"""Titans: attention near by and a neural memory for the rest; the memory as context, as gate, or as layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from attnlab.attend import attend
from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import Owner, RollingCache
from attnlab.nn.mechanism import Mechanism, check_heads, join_heads, split_heads
from attnlab.nn.memory.deep import Weights
from attnlab.nn.memory.neural_memory import MemoryState, NeuralMemory, pieces
from attnlab.nn.sparse.streaming_llm import SlidingWindow
from attnlab.patterns import Pattern
from attnlab.positions import Position


def _card(name: str, state: str, **sample: Any) -> Card:
    return Card(
        name=name,
        title="Titans: Learning to Memorize at Test Time",
        paper="2501.00663",
        system="titans",
        family="memory",
        kind=TOKENS,
        capabilities=CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N w",
        growth=1.0,
        state=state,
        sample=dict(heads=4, persistent=3, memory=dict(chunk=13), **sample),
    )


_MEMORY = "3 * memory.memory.numbers + 3 * (memory.taps - 1) * memory.heads * memory.head_dim"
_WINDOWED = f"2 * (attention.window + len(persistent)) * heads * head_dim + {_MEMORY}"
# Beside the keys and values of the segment so far: the weights it began with, and the inputs of their convolution.
_SEGMENTED = (
    f"2 * heads * head_dim * (len(persistent) + 2 * ((N - 1) % segment + 1)) + {_MEMORY}"
    " + memory.memory.numbers + (memory.taps - 1) * memory.heads * memory.head_dim"
)


class _Titan(Mechanism):
    """What the three share: the persistent tokens, the memory, and the gate y ⊗ m = RMSNorm(y) ⊙ σ(RMSNorm(m))."""

    causal_only = "its memory runs along the tokens"

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int | None,
        persistent: int,
        memory: Mapping[str, Any] | None,
        causal: bool,
        gated: bool,
    ) -> None:
        super().__init__(dim, causal=causal)
        if persistent < 0:
            raise ValueError(f"persistent must be 0 or more, got {persistent}")
        self.heads, self.head_dim = heads, check_heads(dim, heads, None, head_dim)[1]
        self.persistent = nn.Parameter(0.02 * torch.randn(persistent, dim))
        self.memory = NeuralMemory(dim, **{"heads": heads, **(memory or {})})
        if gated:
            self.norm_near, self.norm_memory = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)

    def gate(self, near: Tensor, memory: Tensor) -> Tensor:
        return self.norm_near(near) * self.norm_memory(memory).sigmoid()

    def with_persistent(self, x: Tensor) -> Tensor:
        """The persistent tokens, then x."""
        return torch.cat([self.persistent.to(x.dtype).expand(len(x), -1, -1), x], 1)


class WindowState(NamedTuple):
    """What attention to the window and the memory remember."""

    near: RollingCache
    memory: MemoryState
    owner: Owner


class _Windowed(_Titan):
    """The gate and the layer: attention to a window, with the persistent tokens as its sinks."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        window: int = 512,
        persistent: int = 4,
        memory: Mapping[str, Any] | None = None,
        position: Position | None = None,
        causal: bool = True,
    ) -> None:
        gated = type(self) is MemoryAsGate
        super().__init__(
            dim, heads=heads, head_dim=head_dim, persistent=persistent, memory=memory, causal=causal, gated=gated
        )
        self.attention = SlidingWindow(
            dim, heads=heads, head_dim=head_dim, window=window, sinks=persistent, position=position, causal=True
        )

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> WindowState:
        """The state after the persistent tokens."""
        near = self.attention.initial_state(batch, device=device, dtype=dtype)
        memory = self.memory.initial_state(batch, device=device, dtype=dtype)
        state = WindowState(near, memory, self.owner(batch))
        first = self.persistent.to(device=device, dtype=dtype).expand(batch, -1, -1)
        return self.mix(first, state)[1] if len(self.persistent) else state

    def mix(self, x: Tensor, state: WindowState | None) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: WindowState | None = None,
    ) -> Any:
        self.check(x)
        self.refuse(context=context, pattern=pattern)
        if state is not None:
            self.check_state(state, WindowState, len(x))
            return self.mix(x, state)
        return self.mix(self.with_persistent(x), None)[0][:, len(self.persistent) :]


@register(_card("titans_mag", _WINDOWED, window=7))
class MemoryAsGate(_Windowed):
    """A window of exact attention, gated by a neural memory of everything before (Titans' MAG).

        x̃ = [persistent ; x]        y = window(x̃) ⊗ M(x̃),   a ⊗ m = RMSNorm(a) ⊙ σ(RMSNorm(m))

    x `(B, N, C)` → `(B, N, C)`; all tokens see the learned persistent ones. Time O(N · (w + |M|)); streams with the
    keys and values of the window and the persistent tokens, 2·(w + p)·C, and the state of `NeuralMemory`. The paper
    gives ⊗ in words only: learned norms, then a non-linearity. Causal only. Source: arXiv 2501.00663, section 4.2.

    Args:
        window: w; persistent: p tokens.
        memory: keywords for `NeuralMemory`.
        position: of the window's attention, the persistent tokens being the text's first.
    """

    def mix(self, x: Tensor, state: WindowState | None) -> tuple[Tensor, Any]:
        if state is None:
            return self.gate(self.attention(x), self.memory(x)), None
        near, cache = self.attention(x, state=state.near)
        far, memory = self.memory(x, state=state.memory)
        return self.gate(near, far), WindowState(cache, memory, state.owner)


@register(_card("titans_mal", _WINDOWED, window=7))
class MemoryAsLayer(_Windowed):
    """A neural memory, and a window of exact attention over what it says (Titans' MAL).

        x̃ = [persistent ; x]        y = window(M(x̃))

    x `(B, N, C)` → `(B, N, C)`; cost, state and arguments as for `MemoryAsGate`. Causal only. Source: arXiv 2501.00663,
    section 4.3.
    """

    def mix(self, x: Tensor, state: WindowState | None) -> tuple[Tensor, Any]:
        if state is None:
            return self.attention(self.memory(x)), None
        said, memory = self.memory(x, state=state.memory)
        y, cache = self.attention(said, state=state.near)
        return y, WindowState(cache, memory, state.owner)


@dataclass(frozen=True)
class Paired(Pattern):
    """After `first` keys that all see there are two per query: query i sees those of the queries up to i."""

    first: int

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k < self.first + 2 * (q + 1)


class ContextState(NamedTuple):
    """What a `MemoryAsContext` remembers: the memory, and its current segment."""

    memory: MemoryState
    snapshot: Weights  # the memory's weights at the start of the segment, which it is asked with
    past: Tensor | None  # the last inputs of the convolution of what is asked
    keys: Tensor  # (B, H, persistent + 2 · tokens of the segment, D)
    values: Tensor
    length: int
    owner: Owner


@register(_card("titans_mac", _SEGMENTED, segment=16))
class MemoryAsContext(_Titan):
    """Attention within segments that also reads what a neural memory says of earlier ones (Titans' MAC).

        h = M(x) with the weights from before the segment;   y = attention of x over [persistent ; h ; x];
        M is written with y, token by token;   out = y ⊗ M(y),   a ⊗ m = RMSNorm(a) ⊙ σ(RMSNorm(m))

    x `(B, N, C)` → `(B, N, C)`. Token i of a segment of L sees persistent tokens, and h and x up to i (seeing all of h
    it would see its own future). Segments are in sequence, as the memory is written with what attention makes of them.
    Time O(N · (L + |M|)); streams with the keys and values of the segment, 2·(p + 2L)·C at most, and the state of
    `NeuralMemory` with one more set of weights. Causal only. Source: arXiv 2501.00663, section 4.1.

    Args:
        segment: L; persistent: p tokens.
        memory: keywords for `NeuralMemory`.
        position: turns queries and keys to their places in the text, h_i like x_i; the persistent ones stay.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        segment: int = 128,
        persistent: int = 4,
        memory: Mapping[str, Any] | None = None,
        position: Position | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__(
            dim, heads=heads, head_dim=head_dim, persistent=persistent, memory=memory, causal=causal, gated=True
        )
        if segment < 1:
            raise ValueError(f"segment must be at least 1, got {segment}")
        if isinstance(position, Position) and type(position).bias is not Position.bias:
            raise ValueError(f"position must turn queries and keys, not bias scores; got {type(position).__name__}")
        self.segment, self.position = segment, position
        inner = self.heads * self.head_dim
        self.wq = nn.Linear(dim, inner, bias=False)
        self.wkv = nn.Linear(dim, 2 * inner, bias=False)
        self.wo = nn.Linear(inner, dim, bias=False)

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ContextState:
        memory = self.memory.initial_state(batch, device=device, dtype=dtype)
        keys, values = self._pair(self.persistent.to(device=device, dtype=dtype).expand(batch, -1, -1))
        return ContextState(memory, memory.weights, memory.past_q, keys, values, 0, self.owner(batch))

    def _pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = linear(x, self.wkv.weight).chunk(2, -1)
        return split_heads(k, self.heads), split_heads(v, self.heads)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: ContextState | None = None,
    ) -> Any:
        self.check(x)
        self.refuse(context=context, pattern=pattern)
        first = len(self.persistent)
        before = self.initial_state(len(x), dtype=x.dtype) if state is None else state
        self.check_state(before, ContextState, len(x))
        memory, snapshot, past, keys, values, length, owner = before
        self.memory.memory.check(snapshot, len(x))
        sizes, out = pieces(length % self.segment, x.shape[1], self.segment), []
        for size, x_ in zip(sizes, x.split(sizes, 1), strict=True):
            place = length % self.segment
            if place == 0:
                snapshot, keys, values = memory.weights, keys[:, :, :first], values[:, :, :first]
            h, past = self.memory.recall(x_, snapshot, past)
            q, (k, v), (k_h, v_h) = split_heads(self.wq(x_), self.heads), self._pair(x_), self._pair(h)
            if self.position is not None:
                k_h = self.position(q, k_h, length)[1]
                q, k = self.position(q, k, length)
            keys = torch.cat([keys, torch.stack([k_h, k], 3).flatten(2, 3)], 2)
            values = torch.cat([values, torch.stack([v_h, v], 3).flatten(2, 3)], 2)
            where = None if size == 1 else Paired(first).starting_at(place)  # one token sees all that there is
            y = self.wo(join_heads(attend(q, keys, values, pattern=where)))
            m, memory = self.memory(y, state=memory)
            out.append(self.gate(y, m))
            length += size
        y = torch.cat(out, 1)
        return y if state is None else (y, ContextState(memory, snapshot, past, keys, values, length, owner))
