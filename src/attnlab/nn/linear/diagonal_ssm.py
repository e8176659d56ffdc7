"""S4D: a diagonal linear state space for each channel, run as one long convolution or step by step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, NONCAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import Owner
from attnlab.nn.mechanism import Mechanism


class Modes(NamedTuple):
    """The state of every channel, `(B, C, S/2, 2)`: complex numbers by their two parts."""

    modes: Tensor
    owner: Owner


def powers(exponent: Tensor, length: int) -> Tensor:
    """e^(exponent · l) for l = 0 … length − 1: complex (…) to (…, length)."""
    return (exponent.unsqueeze(-1) * torch.arange(length, device=exponent.device)).exp()


@register(
    Card(
        name="s4d",
        title="On the Parameterization and Initialization of Diagonal State Space Models",
        paper="2206.11893",
        family="linear",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N log N",
        growth=1.0,
        state="dim * states",
        sample=dict(copies=2, states=16),
    )
)
class S4D(Mechanism):
    """Each channel by itself through a linear state space that never changes: a convolution as long as the text.

        h_l = e^{Δ w} h_{l−1} + u_l,   s_l = 2 Re Σ_n c_n (e^{Δ w_n} − 1)/w_n h_ln + d u_l        w in ℂ^(S/2), Re w < 0
        y = Wo gelu(s)                                    s of each of the `copies` (c, d) side by side; Δ per channel

    u (B, N, C) → (B, N, C). What a channel keeps does not depend on what it reads, unlike in `Mamba`. Causal it streams
    with S numbers for each channel; else a second kernel, of other c, runs backwards over the tokens that follow. Cost:
    the kernel O(C S N), from two tables of √N powers, the convolution O(C N log N). Source: arXiv 2206.11893, its
    S4D-Inv, with w shared by all channels as in HazyResearch/state-spaces and in CAB's library (Shark-NLP/CAB), whose
    `num_heads` are the copies.

    Args:
        states: S, even: conjugate pairs count twice. copies: outputs of each channel, which Wo mixes.
        steps: smallest and largest first Δ.
    """

    def __init__(
        self,
        dim: int,
        *,
        states: int = 16,
        copies: int = 1,
        steps: tuple[float, float] = (1e-3, 1e-1),
        causal: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        if states < 2 or states % 2:
            raise ValueError(f"states must be even and at least 2, got {states}")
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}")
        low, high = (math.log(step) for step in steps)
        self.states, self.copies = states, copies
        self.step_log = nn.Parameter(torch.empty(dim).uniform_(low, high))
        n = torch.arange(states // 2)
        rates = torch.complex(torch.full(n.shape, -0.5), states / math.pi * (states / (2 * n + 1) - 1))
        self.decay_log = nn.Parameter((-rates.real).log())
        self.turn = nn.Parameter(rates.imag.clone())
        reads = torch.view_as_complex(torch.randn(2, copies * (1 if causal else 2), dim, states // 2, 2))
        # Random inputs and outputs, scaled to a response of variance one to a constant.
        into = reads[0, :1, :1] / (2 * (reads[0, :1, :1] / rates).abs().square().sum(-1, keepdim=True)).sqrt()
        self.reads = nn.Parameter(torch.view_as_real(reads[1] * into * 0.5**0.5).clone())
        self.skip = nn.Parameter(torch.randn(copies, dim))
        self.wo = nn.Linear(copies * dim, dim)

    def system(self) -> tuple[Tensor, Tensor]:
        """Δ w (C, S/2) and the reads c (e^{Δ w} − 1)/w, for every copy (and direction) (K, C, S/2), complex."""
        wide = torch.promote_types(self.turn.dtype, torch.float32)
        rates = torch.complex(-self.decay_log.to(wide).exp(), self.turn.to(wide))
        exponents = rates * self.step_log.to(wide).exp().unsqueeze(-1)
        return exponents, torch.view_as_complex(self.reads.to(wide)) * (exponents.exp() - 1) / rates

    def kernels(self, length: int) -> Tensor:
        """What one unit of input gives after 0, 1, 2, … steps, (K, C, length), real."""
        exponents, reads = self.system()
        near = math.isqrt(length - 1) + 1
        far = -(-length // near)
        # l = a·near + b: e^{w l} is a product of two tables, and the sum over the modes a product of matrices.
        left = torch.view_as_real(reads.unsqueeze(-2) * powers(near * exponents, far).mT)  # (K, C, far, S/2, 2)
        right = torch.view_as_real(powers(exponents, near))  # (C, S/2, near, 2)
        found = left[..., 0] @ right[..., 0] - left[..., 1] @ right[..., 1]
        return 2 * found.flatten(-2)[..., :length]

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Modes:
        if not self.causal:
            raise ValueError("streaming needs causal=True")
        dtype = torch.promote_types(dtype or self.turn.dtype, torch.float32)
        shape = (batch, self.dim, self.states // 2, 2)
        return Modes(torch.zeros(shape, dtype=dtype, device=device or self.turn.device), self.owner(batch))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Any = None,
        state: Any = None,
    ) -> Any:
        self.check(x)
        self.refuse(context=context, pattern=pattern)
        if state is not None:
            if not self.causal:
                raise ValueError("streaming needs causal=True")
            self.check_state(state, Modes, len(x))
        length, u = x.shape[1], x.mT.to(torch.promote_types(x.dtype, torch.float32))
        kernel = self.kernels(length)
        if not self.causal:
            forwards, backwards = kernel.chunk(2)
            kernel = pad(forwards, (0, length)) + pad(backwards.flip(-1), (length, 0))
        spectrum = torch.fft.rfft(u, 2 * length).unsqueeze(1) * torch.fft.rfft(kernel, 2 * length)
        s = torch.fft.irfft(spectrum, 2 * length)[..., :length] + self.skip.to(u.dtype).unsqueeze(-1) * u.unsqueeze(1)
        after = None
        if state is not None:
            exponents, reads = self.system()
            before, each = torch.view_as_complex(state.modes.to(u.dtype)), powers(exponents, length + 1)
            s = s + 2 * torch.einsum("kcn,cnl,bcn->bkcl", reads, each[..., 1:], before).real
            modes = before * each[..., -1] + torch.einsum("bcl,cnl->bcn", u.to(each.dtype), each[..., :-1].flip(-1))
            after = Modes(torch.view_as_real(modes), state.owner)
        y = self.wo(gelu(s).flatten(1, 2).mT.to(x.dtype))
        return y if after is None else (y, after)
