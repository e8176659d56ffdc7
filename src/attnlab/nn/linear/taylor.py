"""The exponential of attention by its Taylor series: orders 0, 1 and 2 become running sums."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, NONCAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.mechanism import join_heads
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern
from attnlab.positions import Position
from attnlab.scan import scan


@register(
    Card(
        name="taylor",
        title="Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
        paper="2510.11602",
        family="linear",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N D (paper), N D² (taylor)",
        growth=1.0,
        sample=dict(heads=4, form="taylor"),
    )
)
class TaylorAttention(MultiHead):
    """The "approximate" attention of Deconstructing Attention: exp replaced by its second-order Taylor expansion.

        taylor:  y_i = Σ_j (1 + s_ij + s_ij²/2) v_j / Σ_j (1 + s_ij + s_ij²/2)            s_ij = q_i·k_j/√d
        paper:   y_i = mean_j v_j + Σ_j q_i·k_j v_j / Σ_j q_i·k_j + Σ_j q̃_i·k̃_j v_j / Σ_j q̃_i·k̃_j

    with q̃ = q²/√2 and k̃ = k²/√2 element by element, and sums over j ≤ i if causal. x (B, N, C) → (B, N, C), with the
    parameters of `MultiHead`. "taylor" is the series itself: positive weights that sum to one, a state of D² + D + 1
    rows per head. "paper" is the published recurrence, which normalises each order alone: rows sum to 3, and the
    denominator of the first order may come near 0, so its magnitude is kept above 1e-6; its state is 2D + 1 rows.
    Source: arXiv 2510.11602, main text and appendix.

    Args:
        form: "paper" or "taylor".
        Others as for `MultiHead`; positions that turn q and k.
    """

    def __init__(self, dim: int, *, form: Literal["paper", "taylor"] = "paper", **keywords: Any) -> None:
        super().__init__(dim, **keywords)
        if form not in ("paper", "taylor"):
            raise ValueError(f"form must be 'paper' or 'taylor', got {form!r}")
        if isinstance(self.position, Position) and type(self.position).bias is not Position.bias:
            raise ValueError(f"position must turn q and k, not add a bias, got {type(self.position).__name__}")
        self.form = form

    def features(self, x: Tensor) -> list[Tensor]:
        """What stands for q or k in each separately normalised sum."""
        if self.form == "paper":
            return [torch.ones_like(x[..., :1]), x, x.square() / 2**0.5]
        x = x * self.head_dim**-0.25
        square = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / 2**0.5
        return [torch.cat((torch.ones_like(x[..., :1]), x, square), -1)]

    def initial_state(  # type: ignore[override]
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[int, tuple[Tensor, ...]]:
        """The number of tokens so far, and the sums of each order."""
        super().initial_state(batch, device=device, dtype=dtype)
        weight = self.wqkv.weight
        dtype, device = torch.promote_types(dtype or weight.dtype, torch.float32), device or weight.device
        d = self.head_dim
        rows = (1, d, d) if self.form == "paper" else (1 + d + d * d,)
        return 0, tuple(torch.zeros(batch, self.heads, r, d + 1, dtype=dtype, device=device) for r in rows)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: Any = None,
    ) -> Any:
        self.check(x)
        self.refuse(context=context, pattern=pattern)
        if state is not None and not self.causal:
            raise ValueError("streaming needs causal=True")
        offset, before = (0, None) if state is None else state
        q, k, v = self.project(x, None, offset)
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        v = pad(v, (0, 1), value=1.0)  # one more channel, which sums the weights
        total: Any = 0
        after = []
        for i, (fq, fk) in enumerate(zip(self.features(q), self.features(k), strict=True)):
            if self.causal:
                sums, last = scan(fq, fk, v, state=None if before is None else before[i])
                after.append(last)
            else:
                sums = fq @ (fk.mT @ v)
            total = total + sums[..., :-1] / _away_from_zero(sums[..., -1:])
        y = self.wo(join_heads(total))
        return y if state is None else (y, (offset + x.shape[1], tuple(after)))


def _away_from_zero(x: Tensor, least: float = 1e-6) -> Tensor:
    """`x` with its magnitude raised to `least` where it is below, its sign kept."""
    return torch.where(x.abs() < least, torch.where(x < 0, -least, least).to(x), x)
