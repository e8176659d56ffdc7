"""Routes that spend a budget of blocks: so many, or so much of the score."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.patterns import Causal, Pattern
from attnlab.routing.blocks import Partition, Route, Routed

Scope = Literal["query", "block", "head", "all"]


@dataclass(frozen=True)
class BlockRoute(Route):
    """What routes over blocks of keys share: which blocks there are, their scores, and which may be chosen at all.

        score(t, c) = q_t · mean(k in block c)        q_t the query, the mean of its block, or the first of its block

    Args:
        block: keys per block, of which the last may be short; or the blocks themselves, a `Partition`.
        query_block: queries that choose together, likewise; 1 is each for itself, None as many as `block`.
        causal: each query sees its own block up to itself, and whole blocks of the past compete for the rest. The
            queries of a block are then judged by their first: by their mean, later ones would speak for earlier ones.
        own: the block that a query lies in is always chosen, and counts as chosen.
        per_head: each head chooses for itself; if not, all follow the sum of their scores.
        released: do as VMoBA's code does where that differs from its paper. A batch element that has chosen nothing but
            own blocks gets everything; a threshold never reached chooses two blocks in the scopes "query" and "block".
        lengths: of packed sequences; none sees another.
    """

    block: int | Partition = field(kw_only=True)
    query_block: int | Partition | None = field(default=None, kw_only=True)
    causal: bool = field(default=False, kw_only=True)
    own: bool = field(default=False, kw_only=True)
    per_head: bool = field(default=True, kw_only=True)
    released: bool = field(default=False, kw_only=True)
    lengths: tuple[int, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("block", "query_block"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {value}")

    def partitions(self, nq: int, nk: int) -> tuple[Partition, Partition]:
        """The blocks of the queries and of the keys."""
        for name, n in (("queries", nq), ("keys", nk)):
            if self.lengths is not None and sum(self.lengths) != n:
                raise ValueError(f"lengths must sum to the number of {name} {n}, got {self.lengths}")
        cut = [self.block if self.query_block is None else self.query_block, self.block]
        queries, keys = (
            size if isinstance(size, Partition) else Partition.of(size, self.lengths or n)
            for size, n in zip(cut, (nq, nk), strict=True)
        )
        return queries, keys

    def choose(self, scores: Tensor, allowed: Tensor, own: Tensor) -> Tensor:
        """The table `(B, H, Tq, C)` from scores of that shape and from what is allowed and one's own `(Tq, C)`."""
        raise NotImplementedError

    def select(self, q: Tensor, k: Tensor) -> Pattern:
        queries, keys = self.partitions(q.shape[2], k.shape[2])
        scores = block_scores(q.detach(), k.detach(), queries, keys, first=self.causal)
        if not self.per_head:
            scores = scores.sum(1, keepdim=True)
        allowed, own = candidates(queries, keys, causal=self.causal, device=q.device)
        table = self.choose(scores, allowed, own & (self.own or self.causal))
        if self.released:
            table = torch.where((table & ~own).flatten(1).any(1)[:, None, None, None], table, allowed)
        routed = Routed(table, queries, keys)
        return routed & Causal() if self.causal else routed


def block_scores(q: Tensor, k: Tensor, queries: Partition, keys: Partition, *, first: bool = False) -> Tensor:
    """`(B, H, Tq, C)`: each query block's mean (or `first`) query times each key block's mean key, unscaled."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    q = queries.first(q) if first else queries.mean(q)
    grouped = q.unflatten(1, (k.shape[1], -1))  # (B, Hkv, H/Hkv, Tq, D)
    return (grouped @ keys.mean(k).unsqueeze(2).transpose(-1, -2)).flatten(1, 2)


def candidates(
    queries: Partition, keys: Partition, *, causal: bool = False, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Which key blocks each query block may choose, and which of them it lies in: two bool matrices `(Tq, C)`.

    Without `causal`, those of its sequence; with it, those that it lies in and those wholly before it.
    """
    first, end = queries.edges[:-1, None].to(device), queries.edges[1:, None].to(device)
    key_first, key_end = keys.edges[:-1].to(device), keys.edges[1:].to(device)
    together = queries.sequence[:, None].to(device) == keys.sequence.to(device)
    own = (key_first < end) & (first < key_end) & together
    return (together & ((key_end <= first) | own) if causal else together), own


@dataclass(frozen=True)
class TopKBlocks(BlockRoute):
    """The `count` best-scoring blocks of keys per block of queries, or a budget of that many shared more widely.

    scope "query": `count` blocks for each query block and head. "head": a head spends count·Tq blocks where they score
    best. "all": so do all heads together. Sources: MoBA, BiFormer (2303.08810), VMoBA (2506.23858).
    """

    count: int
    scope: Scope = field(default="query", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise ValueError(f"TopKBlocks: count must be at least 1, got {self.count}")
        if self.scope not in ("query", "head", "all"):
            raise ValueError(f"TopKBlocks: scope must be query, head or all, got {self.scope!r}")

    def choose(self, scores: Tensor, allowed: Tensor, own: Tensor) -> Tensor:
        # Own blocks come before all others, whatever their score; NaN scores still choose something.
        scores = scores.masked_fill(own, math.inf).masked_fill(~allowed, -math.inf)
        rows, back = _by_scope(scores, self.scope)
        count = min(self.count, scores.shape[-1]) * (rows.shape[-1] // scores.shape[-1])
        best = rows.topk(count, dim=-1, sorted=False).indices
        table = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, best, True)
        return back(table) & allowed


@dataclass(frozen=True)
class ThresholdBlocks(BlockRoute):
    """As many of the best-scoring blocks as hold the share `threshold` of the score: more where scores are flat.

        g = min-max of the scores within the scope;  Σ of the chosen g ≥ threshold · Σ g

    Within a scope the others of the sequence compete beside one's own block, and the best of them is always chosen.
    scope "query": for each query block and head its key blocks; "block": for each key block its queries and heads;
    "head": for each head its pairs of query and key block; "all": everything (within one batch element).
    Source: VMoBA, arXiv 2506.23858, whose names are query_head, block, head_global and overall.
    """

    threshold: float
    scope: Scope = field(default="query", kw_only=True)
    own: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.threshold >= 0:
            raise ValueError(f"ThresholdBlocks: threshold must be 0 or more, got {self.threshold}")
        if self.scope not in ("query", "block", "head", "all"):
            raise ValueError(f"ThresholdBlocks: scope must be query, block, head or all, got {self.scope!r}")
        if self.causal and self.scope != "query":
            raise ValueError(f"ThresholdBlocks: causal=True needs scope='query', got {self.scope!r} (others see ahead)")

    def choose(self, scores: Tensor, allowed: Tensor, own: Tensor) -> Tensor:
        eps = 1e-6
        allowed, own = allowed.expand(scores.shape), own.expand(scores.shape)
        rows, back = _by_scope(scores, self.scope)
        valid, mine = _by_scope(allowed, self.scope)[0], _by_scope(own, self.scope)[0]
        low = rows.masked_fill(~valid, math.inf).amin(-1, keepdim=True)
        high = rows.masked_fill(~valid, -math.inf).amax(-1, keepdim=True)
        span = (high - low).masked_fill(high - low <= eps, 1.0)
        share = ((rows - low) / span).masked_fill(~valid, 0.0)
        total = share.sum(-1, keepdim=True) + eps
        wanted = (self.threshold - (share * mine).sum(-1, keepdim=True) / total).clamp_min(0.0)
        # Candidates that are out come last where all compete, and tie with the least score elsewhere, as published.
        others = share.masked_fill(mine | ~valid, -1.0 if self.scope == "all" else 0.0)
        others, order = others.sort(dim=-1, descending=True, stable=True)
        reached = others.clamp_min(0.0).cumsum(-1) / total >= wanted
        # Up to and including the first at which enough is reached; all if it never is.
        before = F.pad(~reached[..., :-1], (1, 0), value=True)
        if self.released and self.scope in ("query", "block"):
            before[..., 2:] &= reached[..., -1:]
        table = torch.zeros_like(valid).scatter_(-1, order, before)
        return back((table | mine) & valid)


def _by_scope(x: Tensor, scope: Scope) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`(B, H, Tq, C)` with all entries that compete with each other in the last axis, and the way back."""
    permutation, groups = {
        "query": ((0, 1, 2, 3), 2),
        "block": ((0, 3, 1, 2), 1),
        "head": ((0, 1, 3, 2), 1),
        "all": ((0, 3, 1, 2), 0),
    }[scope]
    moved = x.permute(permutation)
    inverse = tuple(permutation.index(i) for i in range(4))
    rows = moved.flatten(1 + groups) if groups else moved.flatten(1).unsqueeze(1)

    def back(table: Tensor) -> Tensor:
        return table.reshape(moved.shape).permute(inverse)

    return rows, back
