"""The reduced transformer's attention: softmax attention with as few matrices as it can do with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from attnlab.cards import ALL_FOUR, ANY_LENGTH, EXACT, PERMUTATION_EQUIVARIANT, STREAMING, TOKENS, Card, register
from attnlab.nn.mechanism import split_heads
from attnlab.nn.multihead import MultiHead

SIMILARITIES = ("full", "collapsed", "shared", "mirrored", "cholesky")
VALUES = ("full", "merged", "none")


@register(
    Card(
        name="reduced",
        title="Reducing the Transformer Architecture to a Minimum",
        paper="2410.13732",
        system="min_transformer",
        family="softmax",
        kind=TOKENS,
        capabilities=ALL_FOUR | ANY_LENGTH | PERMUTATION_EQUIVARIANT | STREAMING | EXACT,
        cost="N²",
        growth=2.0,
        state="2 * kv_heads * head_dim * N",
        sample=dict(similarity="shared", values="none"),
        limit=lambda dim, grid: ReducedAttention(dim, heads=4, similarity="full", values="full"),
    )
)
class ReducedAttention(MultiHead):
    """Softmax attention without the matrices that it may not need.

        y = softmax(q kᵀ / √D) v Wo        D the width of k, which is C where Wk is gone

    x `(B, N, C)` → `(B, N, C)`. Cost: 2N²C, and 2NC² for each matrix that is left.

    | similarity  | scores                    | parameters | heads |                                            |
    | "full"      | x Wq (x Wk)ᵀ              | 2C²        | any   |                                            |
    | "collapsed" | x W xᵀ                    | C²         | 1     | the same functions as "full"               |
    | "shared"    | x W (x W)ᵀ                | C²         | any   | symmetric, no token repels itself          |
    | "mirrored"  | x S xᵀ, S = Sᵀ            | C(C + 1)/2 | 1     | symmetric, a token may repel itself        |
    | "cholesky"  | x T (x T)ᵀ, T triangular  | C(C + 1)/2 | 1     | the same functions as "shared" with 1 head |

    values: "full", Wv and Wo; "merged", one matrix for both, with 1 head; "none": each output is a mean of inputs, so
    it lies in their convex hull. `merged_from` makes a "collapsed", "merged" one that equals a trained one of one head.
    "full" and "full" is `MultiHead`. Source: arXiv 2410.13732. `options` are `MultiHead`'s.
    """

    ws: nn.Parameter
    wv: nn.Module

    def __init__(
        self, dim: int, *, heads: int = 1, similarity: str = "collapsed", values: str = "none", **options: Any
    ) -> None:
        for name, given, known in (("similarity", similarity, SIMILARITIES), ("values", values, VALUES)):
            if given not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")
        if heads != 1 and (similarity not in ("full", "shared") or values == "merged"):
            raise ValueError(f"similarity={similarity!r} with values={values!r} is for one head, got heads={heads}")
        super().__init__(dim, heads=heads, **options)
        self.similarity, self.values = similarity, values
        if (similarity, values) == ("full", "full"):
            return
        if self.kv_heads != heads or self.head_dim * heads != dim or self.wqkv.bias is not None:
            raise ValueError("kv_heads, head_dim and bias go with similarity='full' and values='full' only")
        del self.wqkv
        entries = {"full": 2 * dim * dim, "collapsed": dim * dim, "shared": dim * dim}.get(
            similarity, dim * (dim + 1) // 2
        )
        shape = (entries // dim, dim) if similarity in ("full", "collapsed", "shared") else (entries,)
        self.ws = nn.Parameter(torch.empty(shape).uniform_(-(dim**-0.5), dim**-0.5))
        self.wv = nn.Linear(dim, dim, bias=False) if values == "full" else nn.Identity()
        if values == "none":
            self.wo = nn.Identity()

    def _matrices(self) -> tuple[Tensor, Tensor | None]:
        """Rows that make queries, and rows that make keys; None where the tokens themselves are the keys."""
        if self.similarity == "full":
            wq, wk = self.ws.chunk(2)
            return wq, wk
        if self.similarity == "collapsed":
            return self.ws, None
        if self.similarity == "shared":
            return self.ws, self.ws
        rows, columns = torch.tril_indices(self.dim, self.dim, device=self.ws.device)
        lower = self.ws.new_zeros(self.dim, self.dim).index_put((rows, columns), self.ws)
        # Tᵀ as rows, since a linear layer holds its matrix transposed.
        return (lower + lower.tril(-1).mT, None) if self.similarity == "mirrored" else (lower.mT, lower.mT)

    def qkv(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        if (self.similarity, self.values) == ("full", "full"):
            return super().qkv(x, context)
        wq, wk = self._matrices()
        source = x if context is None else context
        q = linear(x, wq)
        k = source if wk is None else q if wk is wq and context is None else linear(source, wk)
        return split_heads(q, self.heads), split_heads(k, self.heads), split_heads(self.wv(source), self.heads)

    @classmethod
    def merged_from(cls, trained: MultiHead) -> ReducedAttention:
        """The same function as `trained`, of one head without biases, with half the matrices."""
        if trained.heads != 1 or trained.wqkv.bias is not None or trained.head_dim != trained.dim:
            raise ValueError(f"trained must have one head, as wide as dim, and no biases, got heads={trained.heads}")
        if trained.position is not None or not isinstance(trained.q_norm, nn.Identity):
            raise ValueError("trained must have no position and no norms: they stand between Wq and Wk")
        ours = cls(trained.dim, similarity="collapsed", values="merged", causal=trained.causal)
        wq, wk, wv = trained.wqkv.weight.chunk(3)
        with torch.no_grad():
            ours.to(wq).ws.copy_(wk.mT @ wq)
            ours.wo.weight.copy_(trained.wo.weight @ wv)
        return ours
