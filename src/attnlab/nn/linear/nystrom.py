"""Nyströmformer: softmax attention through the means of segments, the matrix between them inverted by iteration."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from attnlab.attend import attend
from attnlab.cards import ANY_LENGTH, EXACT, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.mechanism import check_keep, check_turns
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Explicit


def segment_means(x: Tensor, segments: int) -> Tensor:
    """Means of `segments` runs of tokens, (…, N, D) to (…, segments, D), N ≥ segments.

    Where N does not divide, the last N mod segments of them are one token longer.
    """
    tokens = x.shape[-2]
    if not 1 <= segments <= tokens:
        raise ValueError(f"segments must lie in 1 to the number of tokens {tokens}, got {segments}")
    size, longer = divmod(tokens, segments)
    cut = (segments - longer) * size
    first = x[..., :cut, :].unflatten(-2, (segments - longer, size)).mean(-2)
    return torch.cat((first, x[..., cut:, :].unflatten(-2, (longer, size + 1)).mean(-2)), -2) if longer else first


def pseudo_inverse(matrix: Tensor, *, iterations: int = 6, shared: bool = False) -> Tensor:
    """The pseudo-inverse of `matrix` by an iteration of third order, products alone: (…, m, m) to the same.

        Z₀ = Aᵀ / (largest column sum);  Z ← ¼ Z (13 I − A Z (15 I − A Z (7 I − A Z)))

    For matrices whose rows are weights: not negative, with sum one. With `shared`, one largest column sum serves the
    whole batch, as in the authors' first code, so that a sample's result depends on the others'. Cost 8m³ for each
    iteration. Source: arXiv 2102.03902.
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix must be square, (…, m, m), got {tuple(matrix.shape)}")
    unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    sums = matrix.sum(-2)
    z = matrix.mT / (sums.amax() if shared else sums.amax(-1)[..., None, None])
    for _ in range(iterations):
        az = matrix @ z
        z = 0.25 * z @ (13 * unit - az @ (15 * unit - az @ (7 * unit - az)))
    return z


@register(
    Card(
        name="nystrom",
        title="Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention",
        paper="2102.03902",
        family="linear",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_LENGTH | EXACT,
        cost="N m + m³",
        growth=1.0,
        sample=dict(heads=4, landmarks=16, conv=3),
        limit=lambda dim, grid: NystromAttention(dim, heads=4, landmarks=2**20),
    )
)
class NystromAttention(MultiHead):
    """Softmax attention of rank m: through m landmarks, the means of m runs of tokens.

        y = Wo [ σ(q k̃ᵀ) σ(q̃ k̃ᵀ)⁺ (σ(q̃ kᵀ) v) + conv(v) ]        σ the softmax over rows of scores / √D

    x (B, N, C) → (B, N, C). q̃ and k̃ are `segment_means`, ⁺ is `pseudo_inverse`. Up to m tokens it is softmax
    attention itself. The weights' rows sum to about one, but may be negative. Cost: 8NmD + 48m³ for each head, O(Nm)
    memory. Source: arXiv 2102.03902 (mlpen/Nystromformer).

    Args:
        landmarks: m. position: turns q and k, before the means.
        conv: taps (odd) of a convolution of the values along the tokens, one kernel per head; 0 for none.
        iterations: of the pseudo-inverse.
        variant: "paper", or "release", that of CAB's library (Shark-NLP/CAB): q and k are each divided by √D, so that
            scores are smaller than softmax attention's by another √D, and the pseudo-inverse begins `shared`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        landmarks: int = 64,
        conv: int = 0,
        iterations: int = 6,
        variant: Literal["paper", "release"] = "paper",
        bias: bool = True,
        causal: bool = False,
        position: Any = None,
    ) -> None:
        if causal:
            raise ValueError("causal must be False: landmarks are made of all tokens")
        if landmarks < 1:
            raise ValueError(f"landmarks must be at least 1, got {landmarks}")
        if conv < 0 or (conv and conv % 2 == 0):
            raise ValueError(f"conv must be odd, or 0 for none, got {conv}")
        if variant not in ("paper", "release"):
            raise ValueError(f"variant must be 'paper' or 'release', got {variant!r}")
        check_turns(position)
        super().__init__(dim, heads=heads, bias=bias, position=position)
        self.landmarks, self.iterations, self.variant = landmarks, iterations, variant
        self.conv = (
            nn.Conv2d(heads, heads, (conv, 1), padding=(conv // 2, 0), groups=heads, bias=False) if conv else None
        )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Any = None,
        state: Any = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """As every mechanism; `keep` (B, N) is False where a token is padding: it counts as zeros, and as no key."""
        self.check(x)
        self.refuse(context=context, pattern=pattern, state=state)
        q, k, v = self.project(x, grid=grid if self.on_grid else None)
        real = None if keep is None else check_keep(keep, k)
        if real is not None:
            k, v = k * real, v * real
            q = q if self.variant == "release" else q * real  # in landmarks, padding's queries would show through
        scale = 1 / self.head_dim if self.variant == "release" else self.head_dim**-0.5
        heads = self.approximate(q, k, v, real, scale)
        if self.conv is not None:
            heads = heads + conv2d(v, self.conv.weight, padding=self.conv.padding, groups=self.heads)
        return self.merge(heads)

    def approximate(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float) -> Tensor:
        tokens = q.shape[2]
        seen = None if real is None else real.mT

        def far(queries: Tensor) -> Tensor:
            pattern = None if seen is None else Explicit(seen.expand(-1, 1, queries.shape[2], -1))
            return attend(queries, k, v, scale=scale, pattern=pattern)

        if tokens <= self.landmarks:
            return far(q)
        marks_q, marks_k = segment_means(q, self.landmarks), segment_means(k, self.landmarks)
        among = (scale * marks_q @ marks_k.mT).softmax(-1)
        inverse = pseudo_inverse(among, iterations=self.iterations, shared=self.variant == "release")
        return (scale * q @ marks_k.mT).softmax(-1) @ (inverse @ far(marks_q))
