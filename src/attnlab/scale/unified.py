"""Sequence models as one template: a matrix that mixes tokens, times what is mixed (the Unified View).

    Y = P(X) · Z(X)          X (B, L, D), P (…, L, L) mixes tokens, Z (B, L, D) works on each token by itself

Each mixer here has a fast form, `forward(x)`, and its explicit one: `matrix(x)`, `(B or 1, D or 1, L, L)` for each
channel or one for all, and `inputs(x)`, such that `matrix(x) @ inputs(x)` is `forward(x)`. Small, single-headed, for
comparing and teaching. Source: arXiv 2302.06218 (its template; the report's columns).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import OPERATOR, Card, register
from attnlab.patterns import Full, Pattern, Window
from attnlab.scan import scan


@dataclass(frozen=True)
class Traits:
    """What the report says of a mixer; `train` and `infer` are how FLOPs grow in L, of all tokens and to decode one."""

    data_dependent: bool
    positional: bool  # whether it knows where tokens stand, by itself
    train: str
    infer: str
    memory: str
    exact: str  # of what, if it stands for something else


class TokenMixer(nn.Module):
    """`(B, L, D)` → the same; `matrix(x)` and `inputs(x)` say how."""

    traits: ClassVar[Traits]

    def __init__(self, dim: int, length: int) -> None:
        super().__init__()
        self.dim, self.length = dim, length

    def matrix(self, x: Tensor) -> Tensor:
        """P, `(B or 1, D or 1, L, L)`."""
        raise NotImplementedError

    def inputs(self, x: Tensor) -> Tensor:
        """Z, what is mixed, `(B, L, D)`."""
        return x

    def explicit(self, x: Tensor) -> Tensor:
        """P Z: what `forward` gives, by L² products."""
        p, z = self.matrix(x), self.inputs(x)
        if p.is_complex() or z.is_complex():
            p, z = p.to(torch.complex128), z.to(torch.complex128)
        mixed = (p @ z.mT.unsqueeze(-1)).squeeze(-1).mT
        return (mixed.real if mixed.is_complex() else mixed).to(x.dtype)


class _Attention(TokenMixer):
    def __init__(self, dim: int, length: int) -> None:
        super().__init__(dim, length)
        self.wq, self.wk, self.wv = (nn.Linear(dim, dim, bias=False) for _ in range(3))

    def inputs(self, x: Tensor) -> Tensor:
        return self.wv(x)


class SelfAttention(_Attention):
    """P = softmax(Q Kᵀ / √D), where the pattern allows (a sparse pattern is a mask)."""

    traits = Traits(True, False, "L²", "L", "L", "")

    def __init__(self, dim: int, length: int, *, pattern: Pattern | None = None) -> None:
        super().__init__(dim, length)
        self.pattern = pattern

    def matrix(self, x: Tensor) -> Tensor:
        scores = self.wq(x) @ self.wk(x).mT * self.dim**-0.5
        seen = (self.pattern or Full()).matrix(x.shape[1])
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return attend(*(w(x)[:, None] for w in (self.wq, self.wk, self.wv)), pattern=self.pattern)[:, 0]


class LocalAttention(SelfAttention):
    """P = softmax under a causal window: a band."""

    traits = Traits(True, True, "L", "1", "L", "")

    def __init__(self, dim: int, length: int) -> None:
        super().__init__(dim, length, pattern=Window(16))


class KernelAttention(_Attention):
    """P = diag(φ(Q) Σφ(K))⁻¹ φ(Q) φ(K)ᵀ, φ = elu + 1, causal: sums along the sequence."""

    traits = Traits(True, True, "L", "1", "L", "a kernel in softmax's place")

    def matrix(self, x: Tensor) -> Tensor:
        weights = (F.elu(self.wq(x)) + 1) @ (F.elu(self.wk(x)) + 1).mT
        weights = weights.tril()
        return (weights / weights.sum(-1, keepdim=True))[:, None]

    def forward(self, x: Tensor) -> Tensor:
        q, k = ((F.elu(w(x)) + 1)[:, None] for w in (self.wq, self.wk))
        sums, _ = scan(q, k, F.pad(self.wv(x)[:, None], (0, 1), value=1.0))
        return (sums[..., :-1] / sums[..., -1:])[:, 0]


class Recurrent(_Attention):
    """P_ij = qᵢᵀ (Π_{j<t≤i} e^{−δ_t}) kⱼ, lower triangular and semiseparable: a state that forgets."""

    traits = Traits(True, True, "L", "1", "L", "")

    def __init__(self, dim: int, length: int) -> None:
        super().__init__(dim, length)
        self.wd = nn.Linear(dim, 1)

    def matrix(self, x: Tensor) -> Tensor:
        along = F.logsigmoid(self.wd(x)).cumsum(1)
        decay = (along - along.mT).tril().exp().tril()
        return ((self.wq(x) @ self.wk(x).mT) * decay)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x)[:, None] for w in (self.wq, self.wk, self.wv))
        return scan(q, k, v, decay=F.logsigmoid(self.wd(x)).mT)[0][:, 0]


class Linformer(_Attention):
    """P = softmax(Q (E K)ᵀ / √D) F, of rank m: keys and values are projected along the sequence (2006.04768)."""

    traits = Traits(True, True, "L", "L", "L", "softmax attention of low rank")

    def __init__(self, dim: int, length: int, *, rank: int = 8) -> None:
        super().__init__(dim, length)
        self.e, self.f = (nn.Parameter(torch.randn(rank, length) * length**-0.5) for _ in range(2))

    def _weights(self, x: Tensor) -> Tensor:
        return (self.wq(x) @ (self.e @ self.wk(x)).mT * self.dim**-0.5).softmax(-1)

    def matrix(self, x: Tensor) -> Tensor:
        return (self._weights(x) @ self.f)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return self._weights(x) @ (self.f @ self.wv(x))


class Nystrom(_Attention):
    """P = softmax(Q K̃ᵀ) softmax(Q̃ K̃ᵀ)⁺ softmax(Q̃ Kᵀ), landmarks K̃, Q̃ means of m segments (2102.03902)."""

    traits = Traits(True, True, "L", "L", "L", "softmax attention, where m = L")

    def __init__(self, dim: int, length: int, *, landmarks: int = 8) -> None:
        super().__init__(dim, length)
        self.landmarks = landmarks

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = self.wq(x) * self.dim**-0.5, self.wk(x)
        few_q, few_k = (torch.stack([p.mean(1) for p in t.tensor_split(self.landmarks, 1)], 1) for t in (q, k))
        return (q @ few_k.mT).softmax(-1), torch.linalg.pinv((few_q @ few_k.mT).softmax(-1)), (few_q @ k.mT).softmax(-1)

    def matrix(self, x: Tensor) -> Tensor:
        a, inverse, b = self._factors(x)
        return (a @ inverse @ b)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        a, inverse, b = self._factors(x)
        return a @ (inverse @ (b @ self.wv(x)))


class Bottleneck(_Attention):
    """P = softmax(Q Lᵀ) softmax(L Kᵀ): all tokens speak to m learned latents, and those to all (2103.03206)."""

    traits = Traits(True, False, "L", "L", "L", "")

    def __init__(self, dim: int, length: int, *, latents: int = 8) -> None:
        super().__init__(dim, length)
        self.latents = nn.Parameter(torch.randn(latents, dim))

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.dim**-0.5
        return (self.wq(x) @ self.latents.T * scale).softmax(-1), (self.latents @ self.wk(x).mT * scale).softmax(-1)

    def matrix(self, x: Tensor) -> Tensor:
        out, into = self._factors(x)
        return (out @ into)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        out, into = self._factors(x)
        return out @ (into @ self.wv(x))


class Fourier(TokenMixer):
    """FNet: Y = Re(Fˢ X Fʰ), P the unnormalised DFT matrix, Z = X Fʰ; the real part comes last (2105.03824)."""

    traits = Traits(False, True, "L log L", "L", "L", "")

    def matrix(self, x: Tensor) -> Tensor:
        return torch.fft.fft(torch.eye(x.shape[1], dtype=torch.complex128))[None, None]

    def inputs(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(x).real.to(x.dtype)


class MLPMixer(TokenMixer):
    """Y = W₂ gelu(W₁ X): P = W₂ diag(Φ(W₁ x)) W₁ for each channel, since gelu(z) = z Φ(z) (2105.01601)."""

    traits = Traits(True, True, "L²", "L²", "L", "")

    def __init__(self, dim: int, length: int, *, hidden: int | None = None) -> None:
        super().__init__(dim, length)
        hidden = hidden or 2 * length
        self.w1 = nn.Parameter(torch.randn(hidden, length) * length**-0.5)
        self.w2 = nn.Parameter(torch.randn(length, hidden) * hidden**-0.5)

    def matrix(self, x: Tensor) -> Tensor:
        gates = torch.special.ndtr(self.w1 @ x)  # (B, M, D)
        return self.w2 @ (gates.mT.unsqueeze(-1) * self.w1)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2 @ F.gelu(self.w1 @ x)


class _Filter(TokenMixer):
    """A causal convolution of each channel with a kernel as long as the sequence: P is Toeplitz."""

    traits = Traits(False, True, "L log L", "L", "L", "")

    def kernel(self, length: int) -> Tensor:
        """`(D, L)`: how much of a token is heard so many steps later."""
        raise NotImplementedError

    def matrix(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        steps = torch.arange(length)[:, None] - torch.arange(length)
        return (self.kernel(length)[:, steps.clamp_min(0)] * (steps >= 0))[None]

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        spectrum = torch.fft.rfft(x, 2 * n, dim=1) * torch.fft.rfft(self.kernel(n), 2 * n).T
        return torch.fft.irfft(spectrum, 2 * n, dim=1)[:, :n].to(x.dtype)


class Convolution(_Filter):
    """P is a Toeplitz band: a short causal filter for each channel."""

    traits = Traits(False, True, "L", "1", "L", "")

    def __init__(self, dim: int, length: int, *, taps: int = 5) -> None:
        super().__init__(dim, length)
        self.weight = nn.Parameter(torch.randn(dim, taps) * taps**-0.5)

    def kernel(self, length: int) -> Tensor:
        return F.pad(self.weight, (0, max(0, length - self.weight.shape[1])))[:, :length]

    def forward(self, x: Tensor) -> Tensor:
        taps = self.weight.shape[1]
        return F.conv1d(F.pad(x.mT, (taps - 1, 0)), self.weight.flip(1)[:, None], groups=self.dim).mT


class StateSpace(_Filter):
    """S4, diagonal: P is Toeplitz with the kernel C Aᵏ B of a linear state space for each channel (2111.00396)."""

    traits = Traits(False, True, "L log L", "1", "L", "")

    def __init__(self, dim: int, length: int, *, states: int = 4) -> None:
        super().__init__(dim, length)
        self.rate = nn.Parameter(torch.rand(dim, states) + 0.05)
        self.turn = nn.Parameter(torch.rand(dim, states) * torch.pi)
        self.b, self.c = (nn.Parameter(torch.randn(dim, states)) for _ in range(2))

    def _step(self) -> Tensor:
        return torch.exp(torch.complex(-self.rate, self.turn))

    def kernel(self, length: int) -> Tensor:
        powers = self._step()[..., None] ** torch.arange(length)
        return ((self.b * self.c)[..., None] * powers).sum(1).real

    def recurrence(self, x: Tensor) -> Tensor:
        """The same one token at a time: h ← A h + B x, y = Re C h."""
        state, outputs = torch.zeros(len(x), *self.b.shape, dtype=self._step().dtype), []
        for token in x.unbind(1):
            state = self._step() * state + self.b * token[..., None]
            outputs.append((self.c * state).sum(-1).real)
        return torch.stack(outputs, 1)


class GlobalFilter(TokenMixer):
    """P = F⁻¹ diag(w) F: a circulant matrix for each channel, learned in frequency (2107.00645)."""

    traits = Traits(False, True, "L log L", "L", "L", "")

    def __init__(self, dim: int, length: int) -> None:
        super().__init__(dim, length)
        self.filter = nn.Parameter(torch.randn(length // 2 + 1, dim, 2))

    def matrix(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        kernel = torch.fft.irfft(torch.view_as_complex(self.filter), n, dim=0)
        return kernel[(torch.arange(n)[:, None] - torch.arange(n)) % n].movedim(-1, 0)[None]

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, dim=1) * torch.view_as_complex(self.filter)
        return torch.fft.irfft(spectrum, x.shape[1], dim=1)


MIXERS: dict[str, type[TokenMixer]] = {
    "attention": SelfAttention,
    "local attention": LocalAttention,
    "kernel attention": KernelAttention,
    "recurrent": Recurrent,
    "linformer": Linformer,
    "nystrom": Nystrom,
    "bottleneck": Bottleneck,
    "fourier": Fourier,
    "mlp mixer": MLPMixer,
    "convolution": Convolution,
    "state space": StateSpace,
    "global filter": GlobalFilter,
}


@register(
    Card(
        name="unified_view",
        title="A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies",
        paper="2302.06218",
        family="linear",
        kind=OPERATOR,
        cost="as the mixer",
    )
)
def mixer(name: str, dim: int, length: int, **options: Any) -> TokenMixer:
    """The mixer of that name for `length` tokens of `dim` channels: fast, and as an explicit matrix. arXiv 2302.06218.

    >>> m = mixer("kernel attention", 8, 32)
    >>> x = torch.randn(1, 32, 8)
    >>> torch.allclose(m(x), m.explicit(x), atol=1e-5)
    True
    """
    if name not in MIXERS:
        raise ValueError(f"name must be one of {', '.join(MIXERS)}, got {name!r}")
    if dim < 1 or length < 1:
        raise ValueError(f"dim and length must be positive, got {dim} and {length}")
    return MIXERS[name](dim, length, **options)


def report() -> list[tuple[str, ...]]:
    """The table of all mixers, its head first."""
    head = (
        "mixer",
        "matrix depends on the data",
        "knows positions",
        "training",
        "decoding a token",
        "memory",
        "stands for",
    )
    rows = [
        (name, *("yes" if t else "no" for t in (k.traits.data_dependent, k.traits.positional)), k.traits.train,
         k.traits.infer, k.traits.memory, k.traits.exact or "itself")
        for name, k in MIXERS.items()
    ]  # fmt: skip
    return [head, *rows]
