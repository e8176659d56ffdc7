"""Mamba in several directions: both ways along a sequence, and four ways over a grid (MambaMixer)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from attnlab.cards import ANY_GRID, ANY_LENGTH, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.linear.selective import Mamba, first_steps
from attnlab.nn.linear.short_conv import ShortConv
from attnlab.nn.mechanism import Mechanism, check_grid
from attnlab.patterns import Pattern
from attnlab.scan.selective import selective_scan


class S6(nn.Module):
    """One selective scan with what its steps, reads and writes come from: `(B, N, E)` to the same, causal.

    (r, b, c) = Wx x,   Δ = softplus(Wr r + bias),   h_t = e^(Δ_t a) ⊙ h_{t−1} + Δ_t x_t b_tᵀ,   y = h c + skip ⊙ x

    With `conv` taps, x is first silu of a short convolution of the input.
    """

    def __init__(self, channels: int, *, states: int, rank: int, conv: int = 0, conv_bias: bool = True) -> None:
        super().__init__()
        self.rank, self.states = rank, states
        self.conv = ShortConv(channels, conv, bias=conv_bias) if conv else None
        self.wx = nn.Linear(channels, rank + 2 * states, bias=False)
        self.wdelta = nn.Linear(rank, channels)
        self.a_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(channels, 1))
        self.skip = nn.Parameter(torch.ones(channels))
        with torch.no_grad():
            nn.init.uniform_(self.wdelta.weight, -(rank**-0.5), rank**-0.5)
            self.wdelta.bias.copy_(first_steps(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            x = silu(self.conv(x)[0])
        wide = torch.promote_types(x.dtype, torch.float32)
        low, b, c = self.wx(x).split([self.rank, self.states, self.states], -1)
        delta = softplus(self.wdelta(low).to(wide))
        return selective_scan(x, delta, -self.a_log.to(wide).exp(), b, c, skip=self.skip)[0]


class _Scans(Mechanism):
    """What both have: widened and gated by maps that the directions share, and not causal."""

    def __init__(
        self, dim: int, *, states: int, expand: int, rank: int | None, causal: bool, inner: int | None = None
    ) -> None:
        super().__init__(dim, causal=causal)
        if causal:
            raise ValueError(f"causal must be False: {type(self).__name__} also scans backwards")
        inner = expand * dim if inner is None else inner
        for name, value in (("expand", expand), ("states", states), ("inner", inner)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.inner, self.states, self.rank = inner, states, rank or -(-dim // 16)


@register(
    Card(
        name="mamba_both_ways",
        title="MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection",
        paper="2403.19888",
        family="linear",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_LENGTH,
        cost="N",
        growth=1.0,
        sample=dict(states=8),
    )
)
class BidirectionalMamba(_Scans):
    """Mamba forwards and backwards, so that each token sees all others; linear in the length.

        x, z = Wi u,   y = S6₁(x) + flip(S6₂(flip x)),   out = Wo (y ⊙ silu(z))

    u `(B, N, C)` → `(B, N, C)`; each direction has its own convolution, steps, reads, writes and rates. On a transposed
    input, `mixer(x.mT).mT`, it is MambaMixer's selective channel mixer: its sequence are the channels and its width the
    tokens, whose number is thereby fixed. Cost O(N E S). Source: arXiv 2403.19888.

    Args:
        states, expand, conv, rank: as for `Mamba`.
        shared: projections and gate are those of both directions; False adds up two whole Mamba blocks.
        inner: E, where it is not expand · C.
    """

    def __init__(
        self,
        dim: int,
        *,
        states: int = 16,
        expand: int = 2,
        conv: int = 4,
        rank: int | None = None,
        shared: bool = True,
        inner: int | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, states=states, expand=expand, rank=rank, causal=causal, inner=inner)
        if inner is not None and not shared:
            raise ValueError("inner goes with shared=True; whole Mamba blocks have expand")
        self.shared = shared
        if shared:
            self.wi = nn.Linear(dim, 2 * self.inner, bias=False)
            self.scans = nn.ModuleList(S6(self.inner, states=states, rank=self.rank, conv=conv) for _ in range(2))
            self.wo = nn.Linear(self.inner, dim, bias=False)
        else:
            self.scans = nn.ModuleList(
                Mamba(dim, states=states, expand=expand, conv=conv, rank=self.rank) for _ in range(2)
            )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: Any = None,
    ) -> Tensor:
        self.check(x)
        self.refuse(context=context, pattern=pattern, state=state)
        forwards, backwards = self.scans
        if not self.shared:
            return forwards(x) + backwards(x.flip(1)).flip(1)
        values, gate = self.wi(x).chunk(2, -1)
        y = forwards(values) + backwards(values.flip(1)).flip(1)
        return self.wo(y * silu(gate))


@register(
    Card(
        name="cross_scan",
        title="MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection",
        paper="2403.19888",
        family="linear",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_GRID,
        cost="N",
        growth=1.0,
        sample=dict(states=4),
    )
)
class CrossScan(_Scans):
    """Mamba over a grid in four directions: along rows, along columns, and both backwards; linear in the places.

        x, z = Wi u,   x = silu(dwconv3×3(x)),   y = Σ_d unorder_d(S6_d(order_d(x))),   out = Wo (y ⊙ silu(z))

    u `(B, H·W, C)` with `grid=(H, W)` → the same; each direction has its own steps, reads, writes and rates. Cost
    O(4 N E S). Sources: arXiv 2403.19888; the four orders are VMamba's (2401.10166).

    Args:
        states, expand, rank: as for `Mamba`. kernel: of the convolution, odd.
    """

    def __init__(
        self,
        dim: int,
        *,
        states: int = 16,
        expand: int = 2,
        kernel: int = 3,
        rank: int | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, states=states, expand=expand, rank=rank, causal=causal)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        self.wi = nn.Linear(dim, 2 * self.inner, bias=False)
        self.conv = nn.Conv2d(self.inner, self.inner, kernel, padding=kernel // 2, groups=self.inner)
        self.scans = nn.ModuleList(S6(self.inner, states=states, rank=self.rank) for _ in range(4))
        self.wo = nn.Linear(self.inner, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: Any = None,
    ) -> Tensor:
        self.check(x)
        self.refuse(context=context, pattern=pattern, state=state)
        grid = check_grid(grid, x.shape[1], 2)
        values, gate = self.wi(x).chunk(2, -1)
        maps = silu(self.conv(values.unflatten(1, grid).permute(0, 3, 1, 2)))
        rows = maps.permute(0, 2, 3, 1).flatten(1, 2)
        right, left, down, up = self.scans
        columns = maps.permute(0, 3, 2, 1).flatten(1, 2)
        y = right(rows) + left(rows.flip(1)).flip(1)
        across = down(columns) + up(columns.flip(1)).flip(1)
        y = y + across.unflatten(1, grid[::-1]).transpose(1, 2).flatten(1, 2)
        return self.wo(y * silu(gate))
