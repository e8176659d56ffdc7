"""Kernel attention: weights are products of features of query and key, which need not be positive."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, pad, relu

from attnlab.attend import attend
from attnlab.cards import ALL_FOUR, ANY_LENGTH, PERMUTATION_EQUIVARIANT, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import Owner
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Causal, Pattern
from attnlab.positions import Position
from attnlab.scan import scan
from attnlab.weightings import Linear

KERNELS = ("elu", "linear", "mlp")


class KernelSums(NamedTuple):
    """The sums over all keys so far, `(B, H, D, D)`; one more channel sums the weights where rows are normalised."""

    sums: Tensor
    length: int
    owner: Owner


@register(
    Card(
        name="kernel",
        title="When Attention Sink Emerges in Language Models: An Empirical View",
        paper="2410.10781",
        family="linear",
        kind=TOKENS,
        capabilities=ALL_FOUR | STREAMING | ANY_LENGTH | PERMUTATION_EQUIVARIANT,
        cost="N",
        growth=1.0,
        state="heads * head_dim * (head_dim + normalise)",
        sample=dict(heads=4, kernel="mlp"),
    )
)
class KernelAttention(MultiHead):
    """Attention whose weight is a scalar product of features, in time linear in the length.

        y_i = Wo · Σ_j a_ij v_j / n_i        a_ij = φ(q_i)·φ(k_j) / √D

    | kernel   | φ(x)                          | n_i, normalised        |
    | "elu"    | elu(x) + 1                    | Σ_j a_ij + 1e-8        |
    | "linear" | x                             | max(|Σ_j a_ij|, 1)     |
    | "mlp"    | W₂ relu(W₁ x), for q, k alike | max(|Σ_j a_ij|, 1)     |

    x `(B, N, C)` → `(B, N, C)`; O(N · C · D) time, and the state that streams is `(B, H, D, D)` or `(B, H, D, D + 1)`.
    A `position` turns q and k before φ. A `pattern` beyond what is causal is taken, at the price of all N² scores.
    Unnormalised, no attention sink forms. Source: arXiv 2410.10781 (sail-sg/Attention-Sink); it is `LinearAttention`
    where "elu" is normalised without positions.
    """

    def __init__(
        self, dim: int, *, heads: int = 8, head_dim: int | None = None, kernel: str = "elu", normalise: bool = True,
        bias: bool = False, causal: bool = False, position: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads=heads, head_dim=head_dim, bias=bias, causal=causal, position=position)
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
        if isinstance(position, Position) and type(position).bias is not Position.bias:
            raise ValueError(f"position must turn q and k: there are no scores to bias, got {type(position).__name__}")
        self.kernel, self.normalise = kernel, normalise
        mlp = kernel == "mlp"
        self.w1 = nn.Linear(self.head_dim, self.head_dim, bias=bias) if mlp else None
        self.w2 = nn.Linear(self.head_dim, self.head_dim, bias=bias) if mlp else None

    def features(self, x: Tensor) -> Tensor:
        """φ of queries or keys `(B, H, N, D)`."""
        if self.w1 is not None and self.w2 is not None:
            return self.w2(relu(self.w1(x)))
        return elu(x) + 1 if self.kernel == "elu" else x

    def over(self, sums: Tensor, total: Tensor) -> Tensor:
        """Sums of weighted values `(…, D)`, or weights, divided by n of the sum of the weights `(…, 1)`."""
        return sums / (total + 1e-8 if self.kernel == "elu" else total.abs().clamp_min(1.0))

    def initial_state(  # type: ignore[override]
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KernelSums:
        if not self.causal:
            raise ValueError("streaming needs causal=True")
        dtype = torch.promote_types(dtype or self.wqkv.weight.dtype, torch.float32)
        shape = (batch, self.heads, self.head_dim, self.head_dim + self.normalise)
        return KernelSums(
            torch.zeros(shape, device=device or self.wqkv.weight.device, dtype=dtype), 0, self.owner(batch)
        )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: Any = None,
    ) -> Any:
        self.check(x, context)
        if state is not None:
            self.refuse(context=context, pattern=pattern)
            if not self.causal:
                raise ValueError("streaming needs causal=True")
            self.check_state(state, KernelSums, len(x))
        q, k, v = self.project(x, context, 0 if state is None else state.length, grid=grid if self.on_grid else None)
        q, k, scale = self.features(q), self.features(k), self.head_dim**-0.5
        if self.normalise:
            v = pad(v, (0, 1), value=1.0)  # one more channel, which sums the weights
        after = None
        if pattern is not None and not (self.causal and type(pattern) is Causal):
            sums = attend(q, k, v, pattern=self.where(pattern, 0, x.shape[1]), weighting=Linear(), scale=scale)
        elif self.causal:
            missing = q.shape[2] - k.shape[2]  # query i sees the context up to i: cut it, or go on with nothing
            k, v = (pad(t, (0, 0, 0, missing)) for t in (k, v)) if missing else (k, v)
            sums, after = scan(q, k, v, scale=scale, state=None if state is None else state.sums)
        else:
            sums = (scale * q) @ (k.mT @ v)
        y = self.merge(self.over(sums[..., :-1], sums[..., -1:]) if self.normalise else sums)
        return y if after is None or state is None else (y, KernelSums(after, state.length + x.shape[1], state.owner))

    def weights(self, x: Tensor, context: Tensor | None = None, **keywords: Any) -> Tensor:
        """The weights `(B, H, N, M)` with which values are mixed: to look at, quadratic in N."""
        q, k, _ = self.project(x, context, grid=keywords.pop("grid", None) if self.on_grid else None)
        pattern = self.where(keywords.pop("pattern", None), 0, x.shape[1])
        self.refuse(**keywords)
        scores = self.features(q) @ self.features(k).mT * self.head_dim**-0.5
        if pattern is not None:
            seen = pattern.matrix(*scores.shape[-2:], batch=len(x), heads=self.heads, device=x.device)
            scores = scores.masked_fill(~seen, 0.0)
        return self.over(scores, scores.sum(-1, keepdim=True)) if self.normalise else scores
