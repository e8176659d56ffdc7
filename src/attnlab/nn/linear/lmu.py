"""Legendre memory: the last `window` values of one signal per layer, kept as coefficients of polynomials."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, relu

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import Owner
from attnlab.nn.mechanism import Mechanism
from attnlab.patterns import Pattern

# Up to so many steps one product with a Toeplitz matrix is faster than Fourier transforms: on one core, 256 wide, of 8
# sequences, 1.3 times at 256 steps and 0.3 times at 512.
_SHORT = 256


class LMUState(NamedTuple):
    """The memory `(B, q)`, and of a spiking cell the potentials of its neurons."""

    memory: Tensor
    potentials: tuple[Tensor, ...]
    owner: Owner = ()


@lru_cache(maxsize=16)
def system(memory: int, window: float) -> tuple[Tensor, Tensor]:
    """A `(q, q)` and B `(q)` of m_t = A m_{t−1} + B u_t in float64: a delay of `window` steps, held within a step.

    Ȧ_ij = (2i + 1)/θ · (−1 if i < j else (−1)^(i − j + 1))        Ḃ_i = (2i + 1)/θ · (−1)^i
    """
    i = torch.arange(memory, dtype=torch.float64, device="cpu")
    rate, sign = (2 * i + 1) / window, 1 - 2 * (i % 2)
    below = -sign.unsqueeze(1) * sign
    whole = torch.zeros(memory + 1, memory + 1, dtype=torch.float64, device="cpu")
    whole[:-1, :-1] = rate.unsqueeze(1) * torch.where(i.unsqueeze(1) < i, -torch.ones_like(below), below)
    whole[:-1, -1] = rate * sign
    whole = torch.linalg.matrix_exp(whole)
    return whole[:-1, :-1].contiguous(), whole[:-1, -1].contiguous()


def responses(a: Tensor, first: Tensor, length: int) -> Tensor:
    """(first, A first, A² first, …) along a new last axis: `(…, q)` to `(…, q, length)`, in log₂(length) products."""
    found, power = first.unsqueeze(-1), a
    while found.shape[-1] < length:
        found = torch.cat((found, power @ found), -1)
        if found.shape[-1] < length:
            power = power @ power
    return found[..., :length]


@lru_cache(maxsize=16)
def impulse(memory: int, window: float, length: int) -> Tensor:
    """What one unit of input leaves in the memory after 0, 1, 2, … steps: `(length, q)` in float64."""
    return responses(*system(memory, window), length).mT.contiguous()


def convolve(u: Tensor, kernel: Tensor) -> Tensor:
    """y_t = Σ_{j ≤ t} kernel_{t−j} u_j: u `(B, N)` and kernel `(N, E)` to `(B, N, E)`."""
    length = u.shape[1]
    if length <= _SHORT:
        return pad(u, (length - 1, 0)).unfold(1, length, 1) @ kernel.flip(0)
    spectrum = torch.fft.rfft(u, 2 * length).unsqueeze(1) * torch.fft.rfft(kernel.mT, 2 * length)
    return torch.fft.irfft(spectrum, 2 * length)[..., :length].mT


class Legendre(Mechanism):
    """What the cell and its spiking twin share: the two maps, the memory's matrices, and its steps.

    The matrices are not trained and in no checkpoint: they are computed, at the precision of the weights, at least
    float32.
    """

    causal_only = "its memory runs along the tokens"
    a: Tensor
    b: Tensor
    kernel: Tensor

    def __init__(self, dim: int, *, memory: int | None, window: int, out_dim: int | None, causal: bool) -> None:
        super().__init__(dim, causal=causal)
        self.memory, self.window, self.out_dim = memory or dim, window, out_dim or dim
        for name in ("memory", "window", "out_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.wu = nn.Linear(dim, 1)
        self.wh = nn.Linear(self.memory + dim, self.out_dim)
        self._fill()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Legendre:
        super()._apply(fn, recurse)
        self._fill()
        return self

    def _fill(self) -> None:
        """The matrices, on the weights' device and at their precision."""
        weight = self.wu.weight
        to: dict[str, Any] = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        q, known = (
            self.memory,
            {"a": (self.memory, self.memory), "b": (self.memory,), "kernel": (self.window, self.memory)},
        )
        for name, shape in known.items():
            self.register_buffer(name, torch.empty(shape, **to), persistent=False)
        if not weight.is_meta:
            a, b = system(q, self.window)
            self.a, self.b, self.kernel = a.to(**to), b.to(**to), impulse(q, self.window, self.window).to(**to)

    def impulse(self, length: int) -> Tensor:
        """`(length, q)`; the longest that was asked for is kept."""
        if length > len(self.kernel):
            if torch.compiler.is_compiling():
                return responses(self.a, self.b, length).mT
            self.kernel = impulse(self.memory, self.window, length).to(self.kernel)
        return self.kernel[:length]

    def after(self, u: Tensor, memory: Tensor) -> Tensor:
        """The memory `(B, q)` behind the inputs `u (B, N)`."""
        length = u.shape[1]
        if length == 1:
            return linear(memory, self.a) + u * self.b
        return responses(self.a, linear(memory, self.a), length)[..., -1] + u.flip(1) @ self.impulse(length)

    def initial_memory(self, batch: int, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
        dtype = torch.promote_types(dtype or self.wu.weight.dtype, torch.float32)
        return torch.zeros(batch, self.memory, device=device or self.wu.weight.device, dtype=dtype)

    def recall(self, memory: Tensor, delays: Tensor) -> Tensor:
        """The input of `delays (D)` steps ago, 0 to `window`, as the memory `(…, q)` has it: `(…, D)`.

        u(t − d) ≈ Σ_i P_i(2d/θ − 1) m_i, with Legendre polynomials P.
        """
        r = 2 * delays.to(memory.dtype) / self.window - 1
        rows = [torch.ones_like(r), r]
        for i in range(1, self.memory - 1):
            rows.append(((2 * i + 1) * r * rows[-1] - i * rows[-2]) / (i + 1))
        return memory @ torch.stack(rows[: self.memory])


@register(
    Card(
        name="lmu",
        title="LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units",
        paper="2402.04882",
        system="lmuformer",
        family="linear",
        kind=TOKENS,
        capabilities=CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N log N",
        growth=1.0,  # of the products; Fourier transforms are not counted
        state="memory",
        sample=dict(memory=12, window=16),
    )
)
class LMU(Legendre):
    """Each token writes one number to a memory of the last `window` of them, and reads all of it through one layer.

        u_t = ReLU(Wu x_t)        m_t = A m_{t−1} + B u_t        y_t = ReLU(Wh [m_t ; x_t] + b)

    x `(B, N, C)` → `(B, N, C)`. A and B are fixed: m holds the coefficients of Legendre polynomials that follow the
    last θ inputs u. Since u is one number per token, the memory is never written out: with Wh = [Wm, Wx] and the
    responses H_t = A^t B,  Wm m_t = Σ_j (Wm H_{t−j}) u_j,  one Toeplitz product, or Fourier transforms for long
    sequences. Cost N·C² + C·N log N, and q·N·C once for all samples; it streams with q numbers, O(q² + C²) a token.
    Causal only. Source: arXiv 2402.04882 (zeyuliu1037/LMUFormer).

    Args:
        dim: C.
        memory: q, C if None.
        window: θ, in tokens; longer sequences are read on, their start forgotten.
        out_dim: width of y where it is not C.
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
        super().__init__(dim, memory=memory, window=window, out_dim=out_dim, causal=causal)

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LMUState:
        return LMUState(self.initial_memory(batch, device, dtype), (), self.owner(batch))

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
        length = x.shape[1]
        u = relu(self.wu(x)).squeeze(-1).to(self.b.dtype)
        reads, own = self.wh.weight.split((self.memory, self.dim), 1)
        reads = reads.to(u.dtype)
        y = linear(x, own, self.wh.bias)
        if state is None:
            return relu(y + convolve(u, linear(self.impulse(length), reads)).to(y.dtype))
        self.check_state(state, LMUState, len(x))
        memory = self.after(u, state.memory)
        if length == 1:
            y = relu(y + linear(memory, reads).to(y.dtype).unsqueeze(1))
        else:
            carried = responses(self.a, linear(state.memory, self.a), length).mT
            read = convolve(u, linear(self.impulse(length), reads)) + linear(carried, reads)
            y = relu(y + read.to(y.dtype))
        return y, LMUState(memory, (), state.owner)
