"""Efficient probing: M learned queries read a frozen encoder's tokens, each for its own block of channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import OPERATOR, Card, register


@register(
    Card(
        name="ep",
        title="Attention, Please! Revisiting Attentive Probing for Masked Image Modeling",
        paper="2506.10178",
        system="ep",
        family="cross",
        kind=OPERATOR,
        cost="N M",
        sample={"dim": 32, "queries": 4},
    )
)
class EfficientProbing(nn.Module):
    """Pools tokens into one vector by M learned queries, with no key, query or output projection.

        A = softmax(Q xᵀ / √C)  (B, M, N)        z_m = W_m (Σ_n A[m, n] x_n) + b_m        y = [z_1 … z_M]

    x (B, N, C) → y (B, C/shrink). All of C tells how alike a query and a token are (one head), and query m fills block
    m of the output. The weights of a query sum to 1, so tokens are pooled before the value map W is applied to them:
    what the authors' code computes, at M N C + C²/shrink multiplications in place of N C²/shrink.
    Parameters: C²/shrink + M C. Source: arXiv 2506.10178.

    Args:
        dim: C. queries: M, which divides C/shrink.
        shrink: how many times narrower the output is than the tokens (the authors' d_out).
        bias: of the value map.
    """

    def __init__(self, dim: int, *, queries: int = 32, shrink: int = 1, bias: bool = False) -> None:
        super().__init__()
        if dim < 1 or shrink < 1 or dim % shrink:
            raise ValueError(f"shrink must divide dim = {dim}, got {shrink}")
        if queries < 1 or (dim // shrink) % queries:
            raise ValueError(f"queries must divide the output's {dim // shrink} channels, got {queries}")
        self.dim, self.out_dim = dim, dim // shrink
        self.queries = nn.Parameter(0.02 * torch.randn(queries, dim))
        self.wv = nn.Linear(dim, self.out_dim, bias=bias)

    def _asked(self, x: Tensor, queries: Tensor | None) -> Tensor:
        """The queries (B, M, C): the learned ones, or those given."""
        if x.ndim != 3 or x.shape[2] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, N, {self.dim}) and not empty, got {tuple(x.shape)}")
        if queries is None:
            return self.queries.expand(len(x), -1, -1)
        if queries.shape != (len(x), *self.queries.shape):
            raise ValueError(f"queries must be {(len(x), *self.queries.shape)}, got {tuple(queries.shape)}")
        return queries

    def maps(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """What each query looks at, A (B, M, N)."""
        return (self._asked(x, queries) * self.dim**-0.5 @ x.mT).softmax(-1)

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """`queries` (B, M, C) replace the learned ones."""
        q = self._asked(x, queries)
        pooled = attend(q[:, None], x[:, None], x[:, None])[:, 0]
        blocks = self.wv.weight.view(q.shape[1], -1, self.dim)
        y = torch.einsum("bmc,mdc->bmd", pooled, blocks).flatten(1)
        return y if self.wv.bias is None else y + self.wv.bias


def likeness(maps: Tensor) -> Tensor:
    """How alike the maps (B, M, N) of one image are: the mean cosine of its pairs, (B,); 1 when all are the same."""
    if maps.ndim != 3 or maps.shape[1] < 2:
        raise ValueError(f"maps must be (B, M, N) with M of at least 2, got {tuple(maps.shape)}")
    unit, count = F.normalize(maps, dim=-1), maps.shape[1]
    return ((unit.sum(1) ** 2).sum(-1) - count) / (count * (count - 1))


def mass_inside(maps: Tensor, region: Tensor) -> Tensor:
    """How much of each map (B, M, N) lies on the tokens of `region` (B, N), true or false: (B, M)."""
    if region.shape != (len(maps), maps.shape[-1]):
        raise ValueError(f"region must be {(len(maps), maps.shape[-1])}, got {tuple(region.shape)}")
    return (maps * region[:, None]).sum(-1)
