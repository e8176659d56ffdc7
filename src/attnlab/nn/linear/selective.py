"""Selective state spaces: Mamba and Mamba-2, whose tokens choose how long a step the state takes and what it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu, softplus

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import Owner
from attnlab.nn.linear.short_conv import ShortConv
from attnlab.nn.mechanism import Mechanism, join_heads, split_heads
from attnlab.patterns import Pattern
from attnlab.scan import scan
from attnlab.scan.selective import selective_scan


class SelectiveState(NamedTuple):
    """What a selective layer remembers: the last inputs of its convolution, and its memory."""

    inputs: Tensor
    memory: Tensor
    owner: Owner = ()


def first_steps(count: int, shortest: float = 1e-3, longest: float = 0.1) -> Tensor:
    """Biases whose softplus is log-uniform in [shortest, longest]: at first, memories of ten to a thousand tokens."""
    steps = torch.empty(count).uniform_(math.log(shortest), math.log(longest)).exp().clamp(min=1e-4)
    return steps + (-torch.expm1(-steps)).log()


class Selective(Mechanism):
    """What Mamba and Mamba-2 share: the widened width, the short convolution, and the steps.

    `step_filter`, where it is set, changes the steps Δ `(B, N, channels)` of a call before they are used; a step of 0
    keeps the state and ignores the token (see `attnlab.recipes.longmamba`).
    """

    a_log: nn.Parameter
    steps: int  # how many steps Δ each token has
    least_step = 0.0
    causal_only = "its state runs along the tokens"

    def __init__(self, dim: int, *, expand: int, states: int, causal: bool) -> None:
        super().__init__(dim, causal=causal)
        for name, value in (("expand", expand), ("states", states)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.inner, self.states = expand * dim, states
        self.step_filter: Callable[[Tensor], Tensor] | None = None

    def rates(self) -> Tensor:
        """a = −e^a_log < 0, in at least float32: `(channels, states)`, or `(heads,)`."""
        return -self.a_log.to(torch.promote_types(self.a_log.dtype, torch.float32)).exp()

    def _steps(self, raw: Tensor) -> Tensor:
        """Δ = softplus(raw), filtered: `(B, N, channels)` in at least float32."""
        delta = softplus(raw.to(torch.promote_types(raw.dtype, torch.float32)))
        if self.least_step:
            delta = delta.clamp(min=self.least_step)
        return delta if self.step_filter is None else self.step_filter(delta)


@register(
    Card(
        name="mamba",
        title="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        paper="2312.00752",
        family="linear",
        kind=TOKENS,
        capabilities=CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N",
        growth=1.0,
        state="inner * (states + conv.taps - 1)",
        sample=dict(states=8),
    )
)
class Mamba(Selective):
    """A diagonal state space per channel whose step, reads and writes each token chooses; linear in the length.

        x, z = Wi u,   x = silu(conv x),   (r, b, c) = Wx x,   Δ = softplus(Wr r + bias)
        h_t = e^(Δ_t a) ⊙ h_{t−1} + Δ_t x_t b_tᵀ,   y = h c + skip ⊙ x
        out = Wo (y ⊙ silu(z))

    u `(B, N, C)` → `(B, N, C)` through E = expand·C channels. A long step forgets the past and takes in the token, a
    step of 0 does neither. Streams with E·(S + taps − 1) numbers whatever the length. Causal only.
    Source: arXiv 2312.00752.

    Args:
        dim: C.
        states: S, numbers per channel.
        expand: E / C.
        conv: taps of the short convolution; conv_bias: with a bias.
        rank: the width between the two maps that give Δ (⌈C/16⌉ if None).
        bias: in the first and the last projection.
    """

    def __init__(
        self,
        dim: int,
        *,
        states: int = 16,
        expand: int = 2,
        conv: int = 4,
        conv_bias: bool = True,
        rank: int | None = None,
        bias: bool = False,
        causal: bool = True,
    ) -> None:
        super().__init__(dim, expand=expand, states=states, causal=causal)
        self.rank, self.steps = rank or -(-dim // 16), self.inner
        self.wi = nn.Linear(dim, 2 * self.inner, bias=bias)
        self.conv = ShortConv(self.inner, conv, bias=conv_bias)
        self.wx = nn.Linear(self.inner, self.rank + 2 * states, bias=False)
        self.wdelta = nn.Linear(self.rank, self.inner)
        self.a_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(self.inner, 1))
        self.skip = nn.Parameter(torch.ones(self.inner))
        self.wo = nn.Linear(self.inner, dim, bias=bias)
        with torch.no_grad():
            nn.init.uniform_(self.wdelta.weight, -(self.rank**-0.5), self.rank**-0.5)
            self.wdelta.bias.copy_(first_steps(self.inner))

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> SelectiveState:
        device, dtype = device or self.wo.weight.device, dtype or self.wo.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        memory = torch.zeros(batch, self.inner, self.states, device=device, dtype=wide)
        return SelectiveState(self.conv.initial_state(batch, device=device, dtype=dtype), memory, self.owner(batch))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: SelectiveState | None = None,
    ) -> Any:
        self.check(x)
        self.refuse(context=context, pattern=pattern)
        past, memory = None, None
        if state is not None:
            self.check_state(state, SelectiveState, len(x))
            past, memory = state.inputs, state.memory
        values, gate = self.wi(x).chunk(2, -1)
        values, past = self.conv(values, past)
        values = silu(values)
        low, b, c = self.wx(values).split([self.rank, self.states, self.states], -1)
        y, memory = selective_scan(
            values, self._steps(self.wdelta(low)), self.rates(), b, c, skip=self.skip, state=memory
        )
        y = self.wo(y * silu(gate))
        return y if state is None else (y, SelectiveState(past, memory, state.owner))


@register(
    Card(
        name="mamba2",
        title="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space "
        "Duality",
        paper="2405.21060",
        family="linear",
        kind=TOKENS,
        capabilities=CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N",
        growth=1.0,
        state="inner * states + (conv.taps - 1) * sum(widths)",
        sample=dict(head_dim=16, states=8, groups=2),
    )
)
class Mamba2(Selective):
    """A state space whose heads each forget at one pace, so that chunks of tokens are products of matrices.

        z, (x | b | c), r = Wi u,   (x | b | c) = silu(conv (x | b | c)),   Δ = softplus(r + bias)   per head
        h_t = e^(Δ_t a) h_{t−1} + Δ_t b_t x_tᵀ,   y = hᵀ c + skip · x
        out = Wo RMSNorm(y ⊙ silu(z))

    u `(B, N, C)` → `(B, N, C)` through E = expand·C channels in E/P heads of P: linear attention with queries c, keys b
    and values Δx, which forgets (`scan`). Streams with E·S + (taps − 1)·(E + 2·groups·S) numbers whatever the length.
    Causal only. Source: arXiv 2405.21060.

    Args:
        dim: C.
        states: S, the width of b and c.
        head_dim: P, which divides E.
        groups: pairs b, c; each serves heads that follow each other, which are normed together.
        least_step: shorter steps Δ are made this long (in Zamba2; a filter comes after).
        expand, conv, conv_bias, bias: as for `Mamba`.
    """

    def __init__(
        self,
        dim: int,
        *,
        states: int = 128,
        head_dim: int = 64,
        groups: int = 1,
        expand: int = 2,
        conv: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        norm_eps: float = 1e-5,
        least_step: float = 0.0,
        causal: bool = True,
    ) -> None:
        super().__init__(dim, expand=expand, states=states, causal=causal)
        if least_step < 0:
            raise ValueError(f"least_step must be 0 or more, got {least_step}")
        self.least_step = least_step
        if head_dim < 1 or self.inner % head_dim:
            raise ValueError(f"head_dim must divide expand · dim = {self.inner}, got {head_dim}")
        self.heads, self.groups = self.inner // head_dim, groups
        if groups < 1 or self.heads % groups:
            raise ValueError(f"groups must divide the number of heads {self.heads}, got {groups}")
        self.norm_eps = norm_eps
        self.head_dim, self.steps = head_dim, self.heads
        self.widths = [self.inner, groups * states, groups * states]
        self.wi = nn.Linear(dim, self.inner + sum(self.widths) + self.heads, bias=bias)
        self.conv = ShortConv(sum(self.widths), conv, bias=conv_bias)
        self.bias = nn.Parameter(first_steps(self.heads))
        self.a_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.Parameter(torch.ones(self.inner))
        self.wo = nn.Linear(self.inner, dim, bias=bias)

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> SelectiveState:
        device, dtype = device or self.wo.weight.device, dtype or self.wo.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        memory = torch.zeros(batch, self.heads, self.states, self.head_dim, device=device, dtype=wide)
        return SelectiveState(self.conv.initial_state(batch, device=device, dtype=dtype), memory, self.owner(batch))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: SelectiveState | None = None,
    ) -> Any:
        self.check(x)
        self.refuse(context=context, pattern=pattern)
        past, memory = None, None
        if state is not None:
            self.check_state(state, SelectiveState, len(x))
            past, memory = state.inputs, state.memory
        gate, mixed, raw = self.wi(x).split([self.inner, sum(self.widths), self.heads], -1)
        mixed, past = self.conv(mixed, past)
        values, b, c = silu(mixed).split(self.widths, -1)
        values = split_heads(values, self.heads)
        delta = self._steps(raw + self.bias).transpose(1, 2)
        y, memory = scan(
            split_heads(c, self.groups), split_heads(b, self.groups),
            (values * delta.unsqueeze(-1)).to(values.dtype), decay=delta * self.rates().unsqueeze(-1), state=memory,
        )  # fmt: skip
        y = join_heads(torch.addcmul(y, values, self.skip.view(-1, 1, 1))) * silu(gate)
        parts = y.unflatten(-1, (self.groups, -1))
        y = nn.functional.rms_norm(parts, parts.shape[-1:], eps=self.norm_eps).flatten(-2)
        y = linear(y * self.norm, self.wo.weight, self.wo.bias)
        return y if state is None else (y, SelectiveState(past, memory, state.owner))
