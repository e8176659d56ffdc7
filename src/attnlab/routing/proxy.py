"""A route that a few averaged heads choose for all, each head as many blocks of it as it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.patterns import Causal, Pattern
from attnlab.routing.blocks import Partition, Route, Routed

# Scores of one step of the estimate: with what is made from them they stay in cache.
_STEP = 2**19


@dataclass(frozen=True)
class ProxyHeads(Route):
    """Blocks of keys ranked by the attention of averaged heads; each head takes the best of them, as many as it needs.

        Q_g, K_g = means over the heads of group g             rank, for all heads of g, for query block m:
        A_g[m, c] = max over i in block m, j in block c of softmax(causal(Q_g K_gᵀ · scale))_ij
        a_h[c] = mean over i in the last block, j in block c of softmax(causal(Q_h K_hᵀ · scale))_ij
        n_h = the least number of blocks that hold the share γ of a_h                            budget of head h

    Query block m of head h sees its n_h best blocks in A_g[m], its own block up to the diagonal, and the first block.
    Of Q_g and K_g every `stride`-th token alone is scored, which with one group makes the ranking 1/(H · stride²) of
    dense attention's scores; the budgets take those of one query block. q and k must be turned to their positions
    already. The choice looks ahead: budgets come from the last queries, ranks from all queries of a block.
    Source: arXiv 2509.24745.

    Args:
        gamma: γ, the share of the attention that is to be kept; 1 is causal attention.
        block: b, tokens per block of queries and of keys; the last may be short.
        groups: how many averaged heads there are; the heads of a key-value head are never parted.
        stride: of queries and of keys, or a pair of them; divides `block`. (Assumed: the paper says 4 and that part of
            the pairs is dropped, not on which side. A key between strides is not seen: where single tokens matter
            take `(4, 1)`, at four times the cost.)
        minimum: every head takes at least so many tokens' worth of blocks.
        diagonal, first: the query's own block, and the first, are seen beside the best ones (assumed).
        scale: D^-½ if None.
    """

    gamma: float = 0.95
    block: int = 128
    groups: int = 1
    stride: int | tuple[int, int] = 4
    minimum: int = 2048
    diagonal: bool = True
    first: bool = True
    scale: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must lie in (0, 1], got {self.gamma}")
        for name, value, least in (("block", self.block, 1), ("groups", self.groups, 1), ("minimum", self.minimum, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not self.diagonal and self.minimum < 1:
            raise ValueError("minimum must be at least 1 with diagonal=False, or a head might see nothing")
        for step in self.strides:
            if step < 1 or self.block % step:
                raise ValueError(f"stride must divide block = {self.block}, got {self.stride}")

    @property
    def strides(self) -> tuple[int, int]:
        """Of queries and of keys."""
        return (self.stride, self.stride) if isinstance(self.stride, int) else self.stride

    def sees_all(self, n: int) -> bool:
        """Whether this is causal attention at `n` tokens, whatever they are."""
        return self.gamma == 1 or n <= -(-self.minimum // self.block) * self.block

    def select(self, q: Tensor, k: Tensor) -> Pattern:
        blocks = self.partition(q, k)
        scores = self.scores(q, k)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        number = torch.arange(blocks.count, device=q.device)
        rank = torch.empty_like(order).scatter_(-1, order, number.expand_as(order))
        table = rank.repeat_interleave(q.shape[1] // self.groups, 1) < self.budgets(q, k)[..., None, None]
        if self.diagonal:
            table |= number[:, None] == number
        if self.first:
            table[..., 0] = True
        return Routed(table & (number <= number[:, None]), blocks, blocks) & Causal()

    def partition(self, q: Tensor, k: Tensor) -> Partition:
        """The blocks, of queries and of keys alike."""
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"ProxyHeads: queries must be as many as keys, {k.shape[2]}, got {q.shape[2]}")
        if k.shape[1] % self.groups:
            raise ValueError(f"groups must divide the number of key heads {k.shape[1]}, got {self.groups}")
        return Partition.of(self.block, k.shape[2])

    @torch.no_grad()
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """log A `(B, groups, query blocks, key blocks)` in at least float32; −inf for later blocks of keys."""
        count = self.partition(q, k).count
        q, k = (self._proxy(x, step) for x, step in zip((q, k), self.strides, strict=True))
        q = q * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        rows, columns = (self.block // step for step in self.strides)
        found = q.new_full((*q.shape[:2], count, count), -math.inf)
        step = max(1, _STEP // (q.shape[0] * q.shape[1] * k.shape[2] * rows))
        for m in range(0, count, step):
            part = q[:, :, m * rows : (m + step) * rows]
            seen = min(m + step, count)
            scores = part @ k[:, :, : seen * columns].mT
            at = torch.arange(m * rows, m * rows + part.shape[2], device=q.device)[:, None] * self.strides[0]
            past = m * columns  # keys before it are seen by all of these queries
            later = torch.arange(past, scores.shape[3], device=q.device) * self.strides[1] > at
            scores[..., past:].masked_fill_(later, -math.inf)
            best = _by_blocks(scores, columns, -math.inf).amax(-1)  # (B, groups, queries, key blocks)
            top = best.amax(-1, keepdim=True)
            best = best - top - scores.sub_(top).exp_().sum(-1, keepdim=True).log_()
            best = _by_blocks(best.mT, rows, -math.inf).amax(-1).mT
            found[:, :, m:seen, :seen] = best
        return found

    @torch.no_grad()
    def budgets(self, q: Tensor, k: Tensor) -> Tensor:
        """How many blocks each head takes for each block of queries, `(B, H)`."""
        blocks = self.partition(q, k)
        least = -(-self.minimum // self.block)
        if self.gamma == 1:
            return torch.full(q.shape[:2], blocks.count, device=q.device)
        begin = (blocks.count - 1) * self.block
        wide = torch.promote_types(q.dtype, torch.float32)
        last = q[:, :, begin:].to(wide) * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        later = torch.ones(last.shape[2], last.shape[2], dtype=torch.bool, device=q.device).triu(1)
        shares = []
        for queries, keys in zip(last.chunk(k.shape[1], 1), k.split(1, 1), strict=True):
            scores = queries @ keys.to(wide).mT
            scores[..., begin:].masked_fill_(later, -math.inf)
            weight = scores.softmax(-1).mean(2)  # (B, H/Hkv, N)
            shares.append(_by_blocks(weight, self.block, 0.0).sum(-1))
        share = torch.cat(shares, 1) / blocks.numbers.to(q.device)
        share = share.sort(dim=-1, descending=True).values
        held = share.cumsum(-1) / share.sum(-1, keepdim=True)
        return ((held < self.gamma).sum(-1) + 1).clamp(min=least, max=blocks.count)

    def _proxy(self, x: Tensor, stride: int) -> Tensor:
        """Means over the heads of each group, of every `stride`-th token, `(B, groups, ⌈N/stride⌉, D)`."""
        x = x[:, :, ::stride].to(torch.promote_types(x.dtype, torch.float32))
        return x.unflatten(1, (self.groups, -1)).mean(2)


def _by_blocks(x: Tensor, size: int, fill: float) -> Tensor:
    """`(…, N)` as `(…, ⌈N/size⌉, size)`, filled up at the end."""
    short = -x.shape[-1] % size
    x = torch.nn.functional.pad(x, (0, short), value=fill) if short else x
    return x.unflatten(-1, (-1, size))
