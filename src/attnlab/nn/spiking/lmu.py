"""Legendre memory between spiking neurons, whose time runs along the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.linear.lmu import Legendre, LMUState, convolve, responses
from attnlab.nn.spiking.lif import LIF
from attnlab.nn.spiking.token_norm import TokenNorm
from attnlab.patterns import Pattern


@register(
    Card(
        name="spiking_lmu",
        title="LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units",
        paper="2402.04882",
        system="lmuformer",
        family="spiking",
        kind=TOKENS,
        capabilities=CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N log N",
        growth=1.0,  # of the products; Fourier transforms are not counted
        state="2 * memory + out_dim + 1",
        sample=dict(memory=12, window=16),
    )
)
class SpikingLMU(Legendre):
    """The Legendre memory unit whose input, memory and output are spikes: tokens pass on 0 and 1 alone.

        u = LIF(BN(Wu x))        m = LIF(BN(H ∗ u))        y = LIF(BN(Wh [m ; x]))

    x `(B, N, C)`, meant to be spikes → y `(B, N, C)` in {0, 1}. H ∗ u is the memory of `LMU`, kept without its spikes,
    so that the parallel form and the steps are one (in the authors' code they are not: its recurrent form leaves out
    the norm and the neurons of m). Time of the neurons is the sequence: `lif`. It streams with 2q + C + 1 numbers.
    Cost N·C·(q + C) + q·N log N. Causal only. Source: arXiv 2402.04882 (zeyuliu1037/LMUFormer).

    Args:
        dim: C. memory: q, 2C if None. window: θ, in tokens. out_dim: width of y where it is not C.
    """

    def __init__(
        self,
        dim: int,
        *,
        memory: int | None = None,
        window: int = 128,
        out_dim: int | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__(dim, memory=memory or 2 * dim, window=window, out_dim=out_dim, causal=causal)
        self.norm_u, self.norm_m, self.norm_h = TokenNorm(1), TokenNorm(self.memory), TokenNorm(self.out_dim)
        self.lif_u, self.lif_m, self.lif_h = (LIF(axis=1) for _ in range(3))

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LMUState:
        to: dict[str, Any] = {"device": device or self.wu.weight.device, "dtype": dtype or self.wu.weight.dtype}
        potentials = tuple(torch.zeros(batch, width, **to) for width in (1, self.memory, self.out_dim))
        return LMUState(self.initial_memory(batch, device, dtype), potentials, self.owner(batch))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: LMUState | None = None,
    ) -> Any:
        self.check(x)
        self.refuse(context=context, pattern=pattern)
        if state is not None:
            self.check_state(state, LMUState, len(x))
        of_u, of_m, of_h = (None, None, None) if state is None else state.potentials
        u, of_u = self.lif_u(self.norm_u(self.wu(x)), of_u)
        signal = u.squeeze(-1).to(self.b.dtype)
        memory = convolve(signal, self.impulse(x.shape[1]))
        if state is not None:
            memory = memory + responses(self.a, linear(state.memory, self.a), x.shape[1]).mT
        m, of_m = self.lif_m(self.norm_m(memory.to(x.dtype)), of_m)
        y, of_h = self.lif_h(self.norm_h(self.wh(torch.cat((m, x), -1))), of_h)
        return y if state is None else (y, LMUState(memory[:, -1], (of_u, of_m, of_h), state.owner))
