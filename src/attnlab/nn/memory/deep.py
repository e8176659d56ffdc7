"""A small network whose weights are a running state, written by gradient descent while tokens are read."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

Weights = tuple[Tensor, ...]


class Course(NamedTuple):
    """How the weights go through T tokens, each `(B, H, T, …)`: see `course`."""

    kept: Tensor  # (…, T, 1): what is left of the first weights
    pushed: Tensor  # (…, T, 1): how much of the first momentum has been added
    kernel: Tensor  # (…, T, T): how much of each token's own update is in the weights after each token
    left: Tensor  # (…, 1, 1): what is left of the first momentum after the last token
    trail: Tensor  # (…, T, 1): and of each token's update, in the momentum


class DeepMemory(nn.Module):
    """A network per head that maps keys to values, M(x) = act(act(x W₁) W₂) …, as a memory.

    Each token t pulls M towards v_t at k_t; u_t is minus the gradient of rate_t · |M(k_t) − v_t|² at the weights
    `anchor`, shortened to rate_t · max_grad_norm at most. Momentum S and weights W then go

        S_t = η_t S_{t−1} + u_t          W_t = (1 − α_t) W_{t−1} + w_t S_t

    and token t reads M with W_t. As all u_t are taken at one anchor, each is a product of two vectors, aᵀδ, per layer,
    and T tokens are read with matrix products, like attention with the weights of `course`:

        x W_t = kept_t x W_0 + pushed_t x S_0 + Σ_{j ≤ t} kernel_tj (x · a_j) δ_j

    so no W_t but the last is ever made. Cost per head and T tokens: O(T · |W| + T² · width).

    Args:
        heads, dim: H networks from dim to dim.
        depth, expansion: layers, and the width between them over dim.
        activation: "silu" or "gelu", between layers.
        residual: M(x) = x + (1 + gain) ⊙ LayerNorm(the network), where the gain is a weight that is written too.
        max_grad_norm: m; a token's gradient g, of all weights together, becomes g / √(1 + |g|²/m²). From two layers on
            g grows with the cube of the weights or faster: unbounded, and taken at weights that were written before,
            it outgrows every number within a few chunks of too long steps.
    """

    def __init__(
        self,
        heads: int,
        dim: int,
        *,
        depth: int = 2,
        expansion: float = 2.0,
        activation: Literal["silu", "gelu"] = "silu",
        residual: bool = False,
        max_grad_norm: float = math.inf,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if activation not in ("silu", "gelu"):
            raise ValueError(f"activation must be 'silu' or 'gelu', got {activation!r}")
        if not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be more than 0, got {max_grad_norm}")
        hidden = int(expansion * dim)
        if hidden < 1:
            raise ValueError(f"expansion must leave at least one channel of {dim}, got {expansion}")
        self.heads, self.depth, self.activation, self.residual = heads, depth, activation, residual
        self.max_grad_norm = max_grad_norm
        widths = [dim, *[hidden] * (depth - 1), dim]
        matrices = [torch.empty(heads, a, b) for a, b in pairwise(widths)]
        for matrix in matrices:
            for head in matrix:
                nn.init.xavier_uniform_(head)
        self.matrices = nn.ParameterList(matrices)
        self.gain = nn.Parameter(torch.zeros(heads, 1, dim)) if residual else None

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device | str | None = None) -> Weights:
        """The weights before the first token, `(B, H, …)`; the gain comes last."""
        every = [*self.matrices] if self.gain is None else [*self.matrices, self.gain]
        return tuple(w.to(device=device, dtype=dtype).expand(batch, *w.shape) for w in every)

    @property
    def numbers(self) -> int:
        """How many numbers one sequence's weights are."""
        return sum(w.numel() for w in self.parameters())

    def check(self, weights: Weights, batch: int) -> None:
        """Raise unless `weights` of a state are those of this memory, for so many sequences."""
        wanted = [(batch, *w.shape) for w in self.parameters()]
        have = [tuple(w.shape) for w in weights]
        if sorted(have) != sorted(wanted):
            raise ValueError(f"state has weights of shapes {have}, wanted {wanted}: it is of another memory or batch")

    def act(self, x: Tensor) -> Tensor:
        return silu(x) if self.activation == "silu" else gelu(x)

    def slope(self, x: Tensor) -> Tensor:
        """The derivative of the activation."""
        if self.activation == "silu":
            s = x.sigmoid()
            return s * (1 + x * (1 - s))
        return 0.5 * (1 + (x * 0.5**0.5).erf()) + x * (-0.5 * x * x).exp() * (2 * torch.pi) ** -0.5

    def through(self, x: Tensor, product: Callable[[int, Tensor], Tensor]) -> Tensor:
        """M(x), where `product(i, h)` multiplies h `(B, H, T, ·)` by the weights i."""
        y = product(0, x)
        for i in range(1, self.depth):
            y = product(i, self.act(y))
        if self.residual:
            y, _ = _normed(y)
            y = x + y * (1 + product(self.depth, torch.ones_like(x[..., :1])))
        return y

    def read(self, q: Tensor, weights: Weights) -> Tensor:
        """M(q) with one set of weights for all tokens of q `(B, H, T, dim)`."""
        return self.through(q, lambda i, h: h @ weights[i])

    def updates(self, k: Tensor, v: Tensor, rate: Tensor, anchor: Weights) -> list[tuple[Tensor, Tensor]]:
        """For each of the weights the pairs a, δ `(B, H, T, ·)`: token t's update u_t is the outer product a_t δ_t."""
        inputs, slopes, y = [k], [], k @ anchor[0]
        for i in range(1, self.depth):
            slopes.append(self.slope(y))
            inputs.append(self.act(y))
            y = inputs[-1] @ anchor[i]
        if self.residual:
            normed, scale = _normed(y)
            grown = 1 + anchor[-1]
            d = -2 * (k + normed * grown - v)
            inputs.append(torch.ones_like(k[..., :1]))
            last = [d * normed]
            d = d * grown
            d = scale * (d - d.mean(-1, keepdim=True) - normed * (d * normed).mean(-1, keepdim=True))
        else:
            d, last = -2 * (y - v), []
        found = [d]
        for i in reversed(range(1, self.depth)):
            d = (d @ anchor[i].mT) * slopes[i - 1]
            found.append(d)
        pairs = list(zip(inputs, found[::-1] + last, strict=True))
        if self.max_grad_norm < math.inf:
            # |aᵀδ| = |a| |δ|. Smooth in g, and without a root of zero for backward to divide by.
            squares = [a.square().sum(-1, keepdim=True) * d.square().sum(-1, keepdim=True) for a, d in pairs]
            rate = rate * (1 + torch.stack(squares).sum(0) / self.max_grad_norm**2).rsqrt()
        return [(a, d * rate) for a, d in pairs]

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rate: Tensor,
        way: Course,
        anchor: Weights,
        weights: Weights,
        momentum: Weights | None,
    ) -> tuple[Tensor, Weights, Weights]:
        """Read and write T tokens: the outputs `(B, H, T, dim)`, and weights and momentum after the last of them.

        q, k, v `(B, H, T, dim)`, rate `(B, H, T, 1)`; momentum None is zero.
        """
        updates = self.updates(k, v, rate, anchor)

        def product(i: int, x: Tensor) -> Tensor:
            a, d = updates[i]
            y = (x @ weights[i]) * way.kept + ((x @ a.mT) * way.kernel) @ d
            return y if momentum is None else y + (x @ momentum[i]) * way.pushed

        out = self.through(q, product)
        kept, pushed, written = way.kept[..., -1:, :], way.pushed[..., -1:, :], way.kernel[..., -1:, :].mT
        after, moved = [], []
        for i, (a, d) in enumerate(updates):
            w, s = weights[i] * kept + a.mT @ (d * written), a.mT @ (d * way.trail)
            after.append(w if momentum is None else w + momentum[i] * pushed)
            moved.append(s if momentum is None else s + momentum[i] * way.left)
        return out, tuple(after), tuple(moved)


def _normed(x: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm without weights over the last axis, and the factor that it scaled by."""
    x = x - x.mean(-1, keepdim=True)
    scale = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return x * scale, scale


def spans(log: Tensor) -> Tensor:
    """Products over spans of tokens, Π_{j < m ≤ i} e^log_m for i ≥ j, else 0: `(…, T)` → `(…, T, T)`.

    Sums of what lies in the span, never differences of sums: exact where log is −inf.
    """
    size = log.shape[-1]
    return log.unsqueeze(-1).expand(*log.shape, size).tril(-1).cumsum(-2).exp().tril()


def course(log_kept: Tensor, log_momentum: Tensor, writes: Tensor | None = None) -> Course:
    """How updates of T tokens arrive in the weights, from log(1 − α), log η `(B, H, T)`; writes w `(T,)`, 1 if None."""
    keep, push = spans(log_kept), spans(log_momentum)
    first_kept, first_pushed = log_kept[..., :1, None].exp(), log_momentum[..., :1, None].exp()
    start = push[..., :1] * first_pushed  # what is left of the momentum from before, at each token
    arrived = push if writes is None else push * writes.unsqueeze(-1)
    before = start if writes is None else start * writes.unsqueeze(-1)
    return Course(
        kept=keep[..., :1] * first_kept,
        pushed=keep @ before,
        kernel=keep @ arrived,
        left=start[..., -1:, :],
        trail=push[..., -1:, :].mT,
    )
