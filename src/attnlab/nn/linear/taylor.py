"""The exponential of attention by its Taylor series: orders 0, 1 and 2 become running sums."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, NONCAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import Owner
from attnlab.nn.mechanism import join_heads
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern
from attnlab.positions import Position
from attnlab.scan import scan

BLOCK = 128  # queries at a time, so that their scores stay in cache
LEAST = 1e-6  # that a sum of weights is divided by
Sums = tuple[Tensor, ...]


class Orders(NamedTuple):
    """How many tokens there were, and the sums over them for each order that is normed alone."""

    length: int
    sums: Sums
    owner: Owner


@register(
    Card(
        name="taylor",
        title="Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
        paper="2510.11602",
        system="deconstruct_attn",
        family="linear",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N D (paper), N D² (taylor)",
        growth=1.0,
        state="heads * (head_dim + 1) * sum(rows)",
        sample=dict(heads=4, form="taylor"),
    )
)
class TaylorAttention(MultiHead):
    """The "approximate" attention of Deconstructing Attention: exp replaced by its second-order Taylor expansion.

        taylor:  y_i = Σ_j (1 + s_ij + s_ij²/2) v_j / Σ_j (1 + s_ij + s_ij²/2)            s_ij = q_i·k_j/√d
        paper:   y_i = mean_j v_j + Σ_j q_i·k_j v_j / Σ_j q_i·k_j + Σ_j q̃_i·k̃_j v_j / Σ_j q̃_i·k̃_j

    with q̃ = q²/√2 and k̃ = k²/√2 element by element, and sums over j ≤ i if causal. x (B, N, C) → (B, N, C), with the
    parameters of `MultiHead`. "taylor" is the series itself, the main text's: positive weights that sum to one, a state
    of D(D + 3)/2 + 1 rows per head. "paper" is the recurrence of the appendix, which norms each order alone (rows sum
    to 3); its state is 2D + 1 rows. The sum Σ_j q_i·k_j changes its sign, and as it is printed that form does not
    train: gradients explode where the sum is near 0. The paper does not say what keeps it away; here its magnitude is
    raised to a share `floor` of the largest that |q_i| and the size of the keys allow, |q_i| (n Σ_j |k_j|²)^½.
    Source: arXiv 2510.11602, equation 6 and appendix I.

    Args:
        form: "paper" or "taylor".
        floor: 0 for the appendix as it is printed, kept from dividing by less than 10⁻⁶.
        Others as for `MultiHead`; positions that turn q and k.
    """

    def __init__(
        self, dim: int, *, form: Literal["paper", "taylor"] = "paper", floor: float = 0.5, **keywords: Any
    ) -> None:
        super().__init__(dim, **keywords)
        if form not in ("paper", "taylor"):
            raise ValueError(f"form must be 'paper' or 'taylor', got {form!r}")
        if isinstance(self.position, Position) and type(self.position).bias is not Position.bias:
            raise ValueError(f"position must turn q and k, not add a bias, got {type(self.position).__name__}")
        if not 0 <= floor <= 1:
            raise ValueError(f"floor must lie in 0 to 1, got {floor}")
        self.form, self.floor = form, floor

    @property
    def rows(self) -> tuple[int, ...]:
        """How many features each separately normalised sum has."""
        d = self.head_dim
        return (1, d, d) if self.form == "paper" else (1 + d + d * (d + 1) // 2,)

    def initial_state(  # type: ignore[override]
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Orders:
        super().initial_state(batch, device=device, dtype=dtype)
        weight = self.wqkv.weight
        dtype, device = torch.promote_types(dtype or weight.dtype, torch.float32), device or weight.device
        shapes = [(batch, self.heads, rows, self.head_dim + 1) for rows in self.rows]
        return Orders(0, tuple(torch.zeros(s, dtype=dtype, device=device) for s in shapes), self.owner(batch))

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
        if state is not None:
            self.check_state(state, Orders, len(x))
        offset, before = (0, None) if state is None else (state.length, state.sums)
        q, k, v = self.project(x, None, offset)
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        v = pad(v, (0, 1), value=1.0)  # one more channel, which sums the weights
        mix = self.joint if self.form == "taylor" else self.apart
        wide = torch.promote_types(v.dtype, torch.float32)
        heads, after = mix(q.to(wide), k.to(wide), v.to(wide), before)
        y = self.wo(join_heads(heads.to(q.dtype)))
        return y if state is None else (y, Orders(offset + x.shape[1], after, state.owner))

    def joint(self, q: Tensor, k: Tensor, v: Tensor, before: Sums | None) -> tuple[Tensor, Sums]:
        """The series: pairs where they are near, features of the powers of q and k where they are far."""
        q, k = q * self.head_dim**-0.25, k * self.head_dim**-0.25
        n, rows = q.shape[2], self.rows[0]
        if not self.causal:
            return normed(series(q @ k.mT) @ v if n <= rows else powers(q) @ (powers(k).mT @ v)), ()
        far, out = None if before is None else before[0], []
        chunk = max(BLOCK, rows // BLOCK * BLOCK)  # as long as pairs cost no more than features
        for start in range(0, n, BLOCK):
            end, first = min(start + BLOCK, n), start // chunk * chunk
            queries, keys, values = q[:, :, start:end], k[:, :, first:end], v[:, :, first:end]
            near = series(queries @ keys.mT).tril_(start - first) @ values
            out.append(near if far is None else near + powers(queries) @ far)
            if (end % chunk == 0 and end < n) or (end == n and before is not None):
                written = powers(keys).mT @ values
                far = written if far is None else far + written
        return normed(torch.cat(out, 2)), () if before is None or far is None else (far,)

    def apart(self, q: Tensor, k: Tensor, v: Tensor, before: Sums | None) -> tuple[Tensor, Sums]:
        """The sum of three means."""
        sizes, energy = q.square().sum(-1, keepdim=True), k.square().sum(-1, keepdim=True)
        q, k, twice = (
            torch.cat((q, q.square() / 2**0.5), 1),
            torch.cat((k, k.square() / 2**0.5), 1),
            v.repeat(1, 2, 1, 1),
        )
        if self.causal:
            zeroth, energy = v.cumsum(2), energy.cumsum(2)
            if before is not None:  # the second order's sum of weights knows the squares of all keys
                zeroth, energy = zeroth + before[0], energy + before[2][..., -1:].sum(2, keepdim=True) * 2**0.5
            both, last = scan(q, k, twice, state=None if before is None else torch.cat(before[1:], 1))
            after = (zeroth[:, :, -1:], *last.chunk(2, 1))
        else:
            zeroth, energy = v.sum(2, keepdim=True).expand_as(v), energy.sum(2, keepdim=True)
            both, after = q @ (k.mT @ twice), ()
        first, second = both.chunk(2, 1)
        least = (self.floor**2 * sizes * energy * zeroth[..., -1:] + LEAST**2).sqrt()
        return normed(zeroth) + normed(first, least) + normed(second), after


def normed(sums: Tensor, least: Tensor | float = LEAST) -> Tensor:
    """Sums over their last channel, whose magnitude is raised to `least`, its sign kept."""
    sums, total = sums[..., :-1], sums[..., -1:]
    least = torch.as_tensor(least, dtype=total.dtype, device=total.device)
    return sums / torch.where(total < 0, total.minimum(-least), total.maximum(least))


def series(s: Tensor) -> Tensor:
    """1 + s + s²/2."""
    return torch.addcmul(s, s, s, value=0.5).add_(1)


def powers(x: Tensor) -> Tensor:
    """Features of `x (..., D)` whose products are the series of x's products: 1, x_a, x_a x_b for a < b, x_a²/√2."""
    a, b = torch.triu_indices(x.shape[-1], x.shape[-1], 1, device=x.device)
    return torch.cat((torch.ones_like(x[..., :1]), x, x[..., a] * x[..., b], x.square() / 2**0.5), -1)
