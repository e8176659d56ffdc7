"""Linear attention: a positive feature map in place of the exponential, so that the sums over keys become a state."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import elu, pad

from attnlab.cards import ALL_FOUR, ANY_LENGTH, PERMUTATION_EQUIVARIANT, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import Owner
from attnlab.nn.mechanism import check_keep, join_heads
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern
from attnlab.scan import scan


class Sums(NamedTuple):
    """The sums over all keys so far, `(B, H, D, D + 1)`, D features of a key wide, and how many tokens there were."""

    sums: Tensor
    owner: Owner
    length: int = 0


@register(
    Card(
        name="linear",
        title="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        paper="2006.16236",
        family="linear",
        kind=TOKENS,
        capabilities=ALL_FOUR | STREAMING | ANY_LENGTH | PERMUTATION_EQUIVARIANT,
        cost="N",
        growth=1.0,
        state="heads * head_dim * (head_dim + 1)",
        sample=dict(heads=4),
    )
)
class LinearAttention(MultiHead):
    """Attention whose weight is a product of positive features, in time linear in the length.

        y_i = Wo · Σ_j φ(q_i)ᵀφ(k_j) v_j / Σ_j φ(q_i)ᵀφ(k_j)        φ(x) = elu(x) + 1

    x `(B, N, C)` → `(B, N, C)`; O(N · C · D) time. Causal, and in cross-attention where query i sees the context up to
    i, the sums run along the tokens (`scan`); the state that streams is `(B, H, D, D + 1)`, whatever the length.
    Source: arXiv 2006.16236.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, heads=heads, head_dim=head_dim, bias=bias, out_bias=out_bias, causal=causal)

    def features(self, x: Tensor) -> Tensor:
        """φ of queries or keys."""
        return elu(x) + 1

    @property
    def width(self) -> int:
        """How many features a query or key has."""
        return self.head_dim

    def mapped(self, q: Tensor, k: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """The features of queries, the first at position `offset`, and of the keys that come with them."""
        return self.features(q), self.features(k)

    def over(self, sums: Tensor, total: Tensor) -> Tensor:
        """Sums of weighted values `(…, D)`, or weights, divided by the sum of the weights `(…, 1)`."""
        return sums / (total + 1e-6)

    def initial_state(  # type: ignore[override]
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Sums:
        if not self.causal:
            raise ValueError("streaming needs causal=True")
        dtype = torch.promote_types(dtype or self.wqkv.weight.dtype, torch.float32)
        shape = (batch, self.heads, self.width, self.head_dim + 1)
        return Sums(torch.zeros(shape, device=device or self.wqkv.weight.device, dtype=dtype), self.owner(batch))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: Any = None,
        keep: Tensor | None = None,
    ) -> Any:
        """As every mechanism; `keep` `(B, M)` is False where a token of the context is padding, which nothing sees."""
        self.check(x, context)
        self.refuse(pattern=pattern)
        if state is not None:
            self.refuse(context=context)
            if not self.causal:
                raise ValueError("streaming needs causal=True")
            self.check_state(state, Sums, len(x))
        offset = 0 if state is None else state.length
        q, k, v = self.project(x, context, offset, grid=grid if self.on_grid else None)
        q, k = self.mapped(q, k, offset)
        v = pad(v, (0, 1), value=1.0)  # one more channel, which sums the weights
        if keep is not None:
            k = k * check_keep(keep, k)
        if self.causal:
            missing = q.shape[2] - k.shape[2]  # query i sees the context up to i: cut it, or go on with nothing
            k, v = (pad(t, (0, 0, 0, missing)) for t in (k, v)) if missing else (k, v)
            sums, after = scan(q, k, v, state=None if state is None else state.sums)
        else:
            sums = q @ (k.mT @ v)
        y = self.wo(join_heads(self.over(sums[..., :-1], sums[..., -1:])))
        return y if state is None else (y, Sums(after, state.owner, state.length + x.shape[1]))

    def weights(self, x: Tensor, context: Tensor | None = None, **keywords: Any) -> Tensor:
        """The weights `(B, H, N, M)` with which values are mixed: to look at, quadratic in N."""
        self.refuse(**keywords)
        q, k, _ = self.project(x, context)
        q, k = self.mapped(q, k, 0)
        scores = q @ k.mT
        scores = scores.tril() if self.causal else scores
        return self.over(scores, scores.sum(-1, keepdim=True))
