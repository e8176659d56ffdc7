"""Attention to the few keys that a cheap low-rank predictor picks for each query of each head (Sparsifiner)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.nn.mechanism import join_heads
from attnlab.nn.multihead import MultiHead
from attnlab.nn.tokens.reorganize import budget


class Connectivity(NamedTuple):
    """What the predictor says of the patches' rows; the class token, the first, sees everything."""

    coefficients: Tensor  # (B, H, N − 1, R): each row's mixture of basis patterns
    approximation: Tensor  # (B, H, N − 1, N): the weights that it expects
    mask: Tensor | None  # (B, H, N, N), bool; None where all is seen
    kept: Tensor | None  # (B, H, N − 1, K): the keys of each row, where all rows have as many


class Attended(NamedTuple):
    """What one layer did."""

    y: Tensor  # (B, N, C)
    connectivity: Connectivity
    q: Tensor  # (B, H, N, D)
    k: Tensor


class ConnectivityPredictor(nn.Module):
    """Which keys each query will want, from a mixture of R learned patterns over the N places.

        coefficients = softmax_R((q W_q) ((k W_k)ᵀ P) / √H)         of them the `top` largest, others 0
        approximation = coefficients · B                            B = |P'ᵀ| where above `floor`, else 0
        mask = the ⌈keep·N⌉ largest of each row                     or all above `above`

    q, k (B, H, N, D) → `Connectivity`. All heads share the weights; P and P' (N, R) fix the number of tokens. The mask
    carries no gradient: the predictor learns by its approximation. With `raw`, as that is learned first, B = P'ᵀ as it
    is, all coefficients count, and there is no mask. Cost per head: 2NRD' + NR·N.
    """

    def __init__(
        self,
        head_dim: int,
        tokens: int,
        *,
        heads: int,
        keep: float = 0.25,
        patterns: int = 32,
        hidden: int | None = None,
        shared: bool = False,
        floor: float = 0.02,
        top: int | None = 8,
        coefficient_floor: float = 0.0,
        above: float | None = None,
    ) -> None:
        super().__init__()
        self.tokens, self.scale, self.keep = tokens, heads**-0.5, budget(tokens, keep)
        if not 1 <= patterns <= tokens:
            raise ValueError(f"patterns must lie in 1 to the number of tokens {tokens}, got {patterns}")
        if top is not None and top < 1:
            raise ValueError(f"top must be at least 1, or None, got {top}")
        self.floor, self.top, self.coefficient_floor, self.above = floor, top, coefficient_floor, above
        width = head_dim // 2 if hidden is None else hidden
        self.wq, self.wk = nn.Linear(head_dim, width), nn.Linear(head_dim, width)
        self.down = nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, patterns), std=0.02))
        self.back = (
            self.down if shared else nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, patterns), std=0.02))
        )

    def forward(
        self, q: Tensor, k: Tensor, alive: Tensor | None = None, *, left: int | None = None, raw: bool = False
    ) -> Connectivity:
        """`alive` (B, N) says which tokens have not been dropped: the class token and `left` patches of each sample."""
        n = q.shape[2]
        if n != self.tokens:
            raise ValueError(f"x must have {self.tokens} tokens, for which patterns were learned, got {n}")
        q, k = self.wq(q[:, :, 1:]), self.wk(k)
        if alive is not None:
            dead = ~alive[:, None, :, None]
            q, k = q.masked_fill(dead[:, :, 1:], 0.0), k.masked_fill(dead, 0.0)
        coefficients = (q @ (k.mT @ self.down) * self.scale).softmax(-1)
        if raw:
            return Connectivity(coefficients, coefficients @ self.back.mT, None, None)
        basis = self.back.mT.abs()
        basis = basis.where(basis > self.floor, 0.0)
        if self.top is not None and self.top < coefficients.shape[-1]:
            best = coefficients.topk(self.top, sorted=False)
            coefficients = torch.zeros_like(coefficients).scatter(-1, best.indices, best.values)
        elif self.top is None:
            coefficients = coefficients.where(coefficients > self.coefficient_floor, 0.0)
        approximation = coefficients @ basis
        return Connectivity(coefficients, approximation, *self.choose(approximation.detach(), alive, left))

    def choose(
        self, score: Tensor, alive: Tensor | None = None, left: int | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The mask (B, H, N, N) and the keys kept (B, H, N − 1, K) by the scores of the patches' rows."""
        if alive is not None:
            score = score.masked_fill(~alive[:, None, None], -math.inf)
        if self.above is not None:
            return F.pad(score > self.above, (0, 0, 1, 0), value=True), None
        keep = self.keep if left is None else min(self.keep, left)
        if keep >= self.tokens:
            return None, None
        kept = score.topk(keep, sorted=False).indices
        mask = torch.zeros_like(score, dtype=torch.bool).scatter(-1, kept, True)
        return F.pad(mask, (0, 0, 1, 0), value=True), kept


class PredictedAttention(MultiHead):
    """Softmax attention, in which each patch sees the keys that `ConnectivityPredictor` picks for it.

        y = Wo · softmax(q kᵀ / √D, where the mask is) v            the class token, the first, sees all

    x (B, N, C) → the same, N = `tokens`. Cost: that of the predictor, and 2N·K·C for K keys each with `sparse` (in
    evaluation); without, a dense product under the mask, which a CPU does faster at the lengths of images.
    Source: arXiv 2303.13755 (lim142857/Sparsifiner).

    Args:
        tokens: N, with the class token. keep: K/N. reduce: N over the number of patterns.
        sparse: compute only the products of keys that are kept.
        predictor: other arguments of `ConnectivityPredictor`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        tokens: int = 197,
        keep: float = 0.25,
        reduce: float = 6,
        bias: bool = True,
        sparse: bool = False,
        **predictor: Any,
    ) -> None:
        super().__init__(dim, heads=heads, bias=bias, out_bias=True)
        if not 1 <= reduce <= tokens:
            raise ValueError(f"reduce must lie in 1 to the number of tokens {tokens}, got {reduce}")
        self.sparse = sparse
        self.predictor = ConnectivityPredictor(
            self.head_dim, tokens, heads=heads, keep=keep, patterns=int(tokens // reduce), **predictor
        )

    def connect(
        self, x: Tensor, alive: Tensor | None = None, *, left: int | None = None, raw: bool = False
    ) -> Attended:
        """One layer, with what it saw; `alive`, `left`, `raw` as for the predictor. Dropped tokens count as zeros."""
        self.check(x)
        if (alive is None) != (left is None):
            raise ValueError(f"alive and left go together, got left={left}")
        q, k, v = self.qkv(x)
        if alive is not None and not raw:
            dead = ~alive[:, None, :, None]
            q, k, v = (t.masked_fill(dead, 0.0) for t in (q, k, v))
        found = self.predictor(q, k, alive, left=left, raw=raw)
        if self.sparse and not self.training and found.kept is not None:
            heads = sparse_attention(q, k, v, found.kept)
        else:
            heads = masked_attention(q, k, v, found.mask, empty=self.predictor.above is not None)
        return Attended(self.wo(join_heads(heads)), found, q, k)

    def forward(self, x: Tensor, context: Tensor | None = None, **given: Any) -> Tensor:
        self.refuse(context=context, **given)
        return self.connect(x).y


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, empty: bool = False) -> Tensor:
    """Softmax attention where `mask` (B, H, N, N) is true; with `empty`, rows may have no key, and give 0."""
    if mask is None or not empty:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    nothing = ~mask.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask | nothing).masked_fill(nothing, 0.0)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """Each patch with its keys `kept` (B, H, N − 1, K) alone, the class token with all: (B, H, N, D)."""
    scale = q.shape[-1] ** -0.5
    at = kept.flatten(2).unsqueeze(-1).expand(-1, -1, -1, q.shape[-1])
    own_k, own_v = (t.gather(2, at).unflatten(2, kept.shape[2:]) for t in (k, v))
    rows = (scale * q[:, :, 1:].unsqueeze(3) @ own_k.mT).softmax(-1) @ own_v
    first = F.scaled_dot_product_attention(q[:, :, :1], k, v)
    return torch.cat((first, rows.squeeze(3)), 2)
