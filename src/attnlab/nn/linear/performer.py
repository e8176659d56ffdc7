"""Performer: softmax attention approximated by positive random features, in time linear in the length."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from attnlab.cards import ALL_FOUR, ANY_LENGTH, PERMUTATION_EQUIVARIANT, STREAMING, TOKENS, Card, register
from attnlab.nn.linear.linear_attention import LinearAttention
from attnlab.nn.mechanism import check_turns


def orthogonal_directions(heads: int, features: int, width: int, *, generator: torch.Generator | None) -> Tensor:
    """Gaussian vectors `(heads, features, width)`, each `width` of which in a row are orthogonal.

    Directions and lengths are drawn apart, so that each vector by itself is Gaussian; their products with a vector err
    less than independent ones do.
    """
    blocks = -(-features // width)
    raw = torch.randn(heads, blocks, width, width, generator=generator)
    turned, upper = torch.linalg.qr(raw)
    turned = turned * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # every rotation is as likely
    lengths = torch.randn(heads, features, width, generator=generator).norm(dim=-1, keepdim=True)
    return turned.mT.flatten(1, 2)[:, :features] * lengths


@register(
    Card(
        name="performer",
        title="Rethinking Attention with Performers",
        paper="2009.14794",
        family="linear",
        kind=TOKENS,
        capabilities=ALL_FOUR | STREAMING | ANY_LENGTH | PERMUTATION_EQUIVARIANT,
        cost="N m",
        growth=1.0,
        state="heads * width * (head_dim + 1)",
        sample=dict(heads=4, random_features=16),
    )
)
class Performer(LinearAttention):
    """Attention whose exponential is estimated by m random features, without a bias and never negative.

        φ(x) = exp(w x' − |x'|²/2) + ε,  x' = x/D^¼,  w (m, D) Gaussian and orthogonal in blocks
        y_i = Wo · Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j)        E[φ(q)·φ(k)]/m = exp(q·k/√D) for ε = 0

    x (B, N, C) → (B, N, C) in O(N · C · m), causal too: then the sums run along the tokens, and the state that streams
    is (B, H, m, D + 1). w is a buffer, drawn by `seed` and saved with the weights; `redraw` draws another. φ(q) is
    divided by its largest feature, which changes nothing but ε. Source: arXiv 2009.14794.

    Args:
        position: turns q and k before the features.
        random_features: m. eps: ε, 1e-4 in CAB's library.
        variant: "paper", or "release", CAB's library (Shark-NLP/CAB): keys are divided by the largest feature of them
            all, and the divisor is at least 0.1, which shrinks outputs wherever the features are small; in training
            every call draws independent w. It is not causal: what CAB calls so reads the future through that largest
            feature, and sums weights but not values over the past.
    """

    projection: Tensor

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        random_features: int = 64,
        eps: float = 1e-6,
        variant: Literal["paper", "release"] = "paper",
        seed: int = 0,
        bias: bool = True,
        out_bias: bool | None = None,
        causal: bool = False,
        position: Any = None,
    ) -> None:
        check_turns(position)
        super().__init__(dim, heads=heads, head_dim=head_dim, bias=bias, out_bias=out_bias, causal=causal)
        if variant not in ("paper", "release"):
            raise ValueError(f"variant must be 'paper' or 'release', got {variant!r}")
        if variant == "release" and causal:
            raise ValueError("causal must be False with variant='release': it leaks the future")
        if random_features < 1:
            raise ValueError(f"random_features must be at least 1, got {random_features}")
        self.position = position
        self.random_features, self.eps, self.variant = random_features, eps, variant
        self.register_buffer("projection", torch.empty(heads, random_features, self.head_dim))
        self.redraw(torch.Generator().manual_seed(seed))

    @property
    def width(self) -> int:
        return self.random_features

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Other random features: between training steps, lest the weights fit the errors of these."""
        drawn = orthogonal_directions(self.heads, self.random_features, self.head_dim, generator=generator)
        self.projection = drawn.to(self.projection)

    def mapped(self, q: Tensor, k: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        release = self.variant == "release"
        w = torch.randn_like(self.projection) if release and self.training else self.projection

        def exponents(x: Tensor) -> tuple[Tensor, Tensor]:
            x = x * self.head_dim**-0.25
            return x @ w.to(x.dtype).mT, x.square().sum(-1, keepdim=True) / 2

        (q, size_q), (k, size_k) = exponents(q), exponents(k)
        # Unshifted keys cannot overflow either: w·x − |x|²/2 ≤ |w|²/2, about D/2.
        top = k.amax((-1, -2), keepdim=True) if release else 0.0
        q = (q - size_q - q.amax(-1, keepdim=True)).exp() + self.eps
        return q * self.random_features**-0.5, ((k - size_k - top).exp() + self.eps) * self.random_features**-0.5

    def over(self, sums: Tensor, total: Tensor) -> Tensor:
        return sums / (total.clamp_min(0.1) if self.variant == "release" else total)
