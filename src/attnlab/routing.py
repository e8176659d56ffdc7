"""Where a query may look, chosen from the content: a route turns q and k into a pattern. May import patterns only.

attend(q, k, v, route=TopKBlocks(8, block=256))              the 8 blocks of keys that suit each block of queries
attend(q, k, v, route=ThresholdBlocks(0.25, block=64))       as many blocks as hold a quarter of the score
attend(q, k, v, route=Clusters(16))                          keys and queries that fall into one cluster

A route only chooses: gradients flow through the attention over what it chose, not through the choice. Scores are
always formed in at least float32, unscaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.patterns import Causal, Pattern

Scope = Literal["query", "block", "head", "all"]


@dataclass(frozen=True, eq=False)
class Partition:
    """A sequence cut into consecutive blocks. Blocks never cross the packed `sequences` that they belong to.

    `edges` (count + 1) are the blocks' first tokens and the end; `sequence` (count) says whose each block is.
    """

    edges: Tensor
    sequence: Tensor

    @classmethod
    def of(cls, size: int, lengths: int | Sequence[int]) -> Partition:
        """Blocks of `size` tokens; the last one of each sequence of `lengths` may be short."""
        lengths = (lengths,) if isinstance(lengths, int) else tuple(lengths)
        if size < 1:
            raise ValueError(f"block must be at least 1, got {size}")
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths must be one or more positive integers, got {lengths}")
        starts, sequence, end = [], [], 0
        for number, length in enumerate(lengths):
            starts.append(torch.arange(end, end + length, size))
            sequence.append(torch.full_like(starts[-1], number))
            end += length
        return cls(torch.cat([*starts, torch.tensor([end])]), torch.cat(sequence))

    @classmethod
    def sized(cls, sizes: Sequence[int]) -> Partition:
        """Blocks of the given sizes, in order, of one sequence."""
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes must be one or more positive integers, got {tuple(sizes)}")
        edges = torch.tensor([0, *sizes]).cumsum(0)
        return cls(edges, torch.zeros(len(sizes), dtype=torch.long))

    @property
    def count(self) -> int:
        return len(self.sequence)

    @cached_property
    def length(self) -> int:
        return int(self.edges[-1])

    @cached_property
    def sizes(self) -> Tensor:
        return self.edges.diff()

    @cached_property
    def size(self) -> int:
        """Tokens of the largest block."""
        return int(self.sizes.max())

    @cached_property
    def uniform(self) -> bool:
        """All blocks of one size but the last, which may be shorter: block i begins at token i·size."""
        return bool((self.sizes[:-1] == self.size).all())

    def block(self, token: Tensor) -> Tensor:
        """The block that each token index lies in (the last one for indices past the end)."""
        if self.uniform:
            return torch.div(token, self.size, rounding_mode="floor").clamp(max=self.count - 1)
        return torch.bucketize(token, self.edges[1:-1].to(token.device), right=True)

    def mean(self, x: Tensor) -> Tensor:
        """The mean token of each block: `(…, length, D)` to `(…, count, D)`."""
        if self.size == 1:
            return x
        if self.uniform:
            padded = F.pad(x, (0, 0, 0, self.count * self.size - self.length))
            total = padded.unflatten(-2, (self.count, self.size)).sum(-2)
        else:
            owner = self.block(torch.arange(self.length, device=x.device))
            total = x.new_zeros(*x.shape[:-2], self.count, x.shape[-1]).index_add_(-2, owner, x)
        return total / self.sizes.to(x.device, x.dtype)[:, None]

    def first(self, x: Tensor) -> Tensor:
        """The first token of each block: `(…, length, D)` to `(…, count, D)`."""
        return x if self.size == 1 else x.index_select(-2, self.edges[:-1].to(x.device))


@dataclass(frozen=True, eq=False, repr=False)
class Routed(Pattern):
    """Chosen blocks: query block t sees key block c where `table[b, h, t, c]` is True.

    `table` is `(B or 1, H or 1, query blocks, key blocks)`, bool. Two selections are never equal, so nothing is cached
    for one that will not come again.
    """

    table: Tensor
    queries: Partition
    keys: Partition
    per_batch = True
    per_head = True

    @classmethod
    def of(cls, index: Tensor, queries: Partition, keys: Partition) -> Routed:
        """From key-block numbers `(B or 1, H or 1, query blocks, K)` per query block."""
        table = torch.zeros(*index.shape[:-1], keys.count, dtype=torch.bool, device=index.device)
        return cls(table.scatter_(-1, index, True), queries, keys)

    def __post_init__(self) -> None:
        if self.table.dim() != 4 or self.table.shape[2:] != (self.queries.count, self.keys.count):
            wanted = f"(B, H, {self.queries.count}, {self.keys.count})"
            raise ValueError(f"Routed: table must have shape {wanted}, got {tuple(self.table.shape)}")

    def check(self, nq: int, nk: int) -> None:
        if (nq, nk) != (self.queries.length, self.keys.length):
            raise ValueError(
                f"Routed: chosen for {self.queries.length} queries and {self.keys.length} keys, "
                f"but there are {nq} queries and {nk} keys"
            )

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        batch, heads = self.table.shape[:2]
        b, h = (b if batch > 1 else torch.zeros_like(b)), (h if heads > 1 else torch.zeros_like(h))
        return self.table[b, h, self.queries.block(q), self.keys.block(k)]

    def density(self, nq: int | None = None, nk: int | None = None) -> float:
        """The share of pairs that are seen, over all batches and heads."""
        at = self.table.device
        tall, wide = self.queries.sizes.to(at).double(), self.keys.sizes.to(at).double()
        pairs = torch.einsum("bhtc,t,c->bh", self.table.double(), tall, wide)
        return float(pairs.mean()) / (self.queries.length * self.keys.length)

    def __repr__(self) -> str:
        return (
            f"Routed({self.queries.count} query blocks of {self.queries.size}, {self.keys.count} key blocks of "
            f"{self.keys.size}, density {self.density():.3g})"
        )


class Route:
    """Chooses from the content where each query may look."""

    def select(self, q: Tensor, k: Tensor) -> Pattern:
        """The pattern for heads `q (B, H, Nq, D)` and `k (B, Hkv, Nk, D)`. Not differentiable."""
        raise NotImplementedError


@dataclass(frozen=True)
class BlockRoute(Route):
    """What routes over blocks of keys share: which blocks there are, their scores, and which may be chosen at all.

        score(t, c) = q_t · mean(k in block c)        q_t the query, the mean of its block, or the first of its block

    Args:
        block: keys per block; the last block may be short.
        query_block: queries that choose together; 1 is each for itself, None as many as `block`.
        causal: each query sees its own block up to itself, and whole blocks of the past compete for the rest. The
            queries of a block are then judged by their first: by their mean, later ones would speak for earlier ones.
        own: the block that a query lies in is always chosen, and counts as chosen.
        per_head: each head chooses for itself; if not, all follow the sum of their scores.
        lengths: of packed sequences; none sees another.
    """

    block: int = field(kw_only=True)
    query_block: int | None = field(default=None, kw_only=True)
    causal: bool = field(default=False, kw_only=True)
    own: bool = field(default=False, kw_only=True)
    per_head: bool = field(default=True, kw_only=True)
    lengths: tuple[int, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("block", "query_block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {value}")

    def partitions(self, nq: int, nk: int) -> tuple[Partition, Partition]:
        """The blocks of the queries and of the keys."""
        for name, n in (("queries", nq), ("keys", nk)):
            if self.lengths is not None and sum(self.lengths) != n:
                raise ValueError(f"lengths must sum to the number of {name} {n}, got {self.lengths}")
        keys = Partition.of(self.block, self.lengths or nk)
        query_block = self.block if self.query_block is None else self.query_block
        if nq == nk and query_block == self.block:
            return keys, keys
        return Partition.of(query_block, self.lengths or nq), keys

    def choose(self, scores: Tensor, allowed: Tensor, own: Tensor) -> Tensor:
        """The table `(B, H, Tq, C)` from scores of that shape and from what is allowed and one's own `(Tq, C)`."""
        raise NotImplementedError

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor) -> Pattern:
        queries, keys = self.partitions(q.shape[2], k.shape[2])
        scores = block_scores(q, k, queries, keys, first=self.causal)
        if not self.per_head:
            scores = scores.sum(1, keepdim=True)
        allowed, own = candidates(queries, keys, causal=self.causal, device=q.device)
        routed = Routed(self.choose(scores, allowed, own & (self.own or self.causal)), queries, keys)
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


@dataclass(frozen=True, eq=False, repr=False)
class Clustered(Pattern):
    """A query sees the keys with which it shares at least one cluster.

    `queries` `(B, H, Nq, clusters)` and `keys` `(B, Hkv, Nk, clusters)`, bool: who is a member of which cluster.
    """

    queries: Tensor
    keys: Tensor
    per_batch = True
    per_head = True

    def check(self, nq: int, nk: int) -> None:
        if (nq, nk) != (self.queries.shape[2], self.keys.shape[2]):
            raise ValueError(
                f"Clustered: chosen for {self.queries.shape[2]} queries and {self.keys.shape[2]} keys, "
                f"but there are {nq} queries and {nk} keys"
            )

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        kv = torch.div(h, self.queries.shape[1] // self.keys.shape[1], rounding_mode="floor")
        seen = torch.zeros((), dtype=torch.bool, device=self.queries.device)
        for cluster in range(self.queries.shape[-1]):
            seen = seen | (self.queries[..., cluster][b, h, q] & self.keys[..., cluster][b, kv, k])
        return seen

    def __repr__(self) -> str:
        return f"Clustered({self.queries.shape[-1]} clusters of {int(self.keys[0, 0, :, 0].sum())} keys)"


@dataclass(frozen=True, eq=False)
class Clusters(Route):
    """Content clusters of equal size: each centroid takes the `size` queries and the `size` keys nearest to it.

    Nearness is the dot product with the unit-length token. A token may fall into several clusters, and then sees all
    of them in one softmax, or into none, and then gets zeros. Cost N²/clusters. Membership is decided over the whole
    sequence, so with `causal` only what a query reads is causal, not the choice: as in the paper.
    Source: Routing Transformer, arXiv 2003.05997 (which averages the outputs of a token's clusters instead).

    Args:
        count: number of clusters, √N being the cheapest.
        size: tokens in each; ⌈N / count⌉ if None.
        centroids: `(Hkv, count, D)`; None runs `rounds` of k-means on the unit-length keys of each call.
        causal: hides later keys.
    """

    count: int
    size: int | None = None
    centroids: Tensor | None = None
    causal: bool = False
    rounds: int = 4

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"Clusters: count must be at least 1, got {self.count}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"Clusters: size must be at least 1, got {self.size}")

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor) -> Pattern:
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = F.normalize(q.to(wide), dim=-1), F.normalize(k.to(wide), dim=-1)
        if self.centroids is None:
            centroids = kmeans(k, self.count, rounds=self.rounds)
        else:
            wanted = (k.shape[1], self.count, k.shape[3])
            if tuple(self.centroids.shape) != wanted:
                raise ValueError(
                    f"Clusters: centroids must have shape (Hkv, count, D) = {wanted}, got {tuple(self.centroids.shape)}"
                )
            centroids = self.centroids.to(k)[None]
        centroids_of_q = centroids.repeat_interleave(q.shape[1] // k.shape[1], 1)
        clustered = Clustered(self._members(q, centroids_of_q), self._members(k, centroids))
        return clustered & Causal() if self.causal else clustered

    def _members(self, x: Tensor, centroids: Tensor) -> Tensor:
        """`(B, H, N, count)`, bool: the `size` tokens nearest to each centroid."""
        n = x.shape[2]
        nearness = x @ centroids.transpose(-1, -2)
        size = min(-(-n // self.count) if self.size is None else self.size, n)
        best = nearness.topk(size, dim=2, sorted=False).indices
        return torch.zeros_like(nearness, dtype=torch.bool).scatter_(2, best, True)


def kmeans(x: Tensor, count: int, *, rounds: int = 4) -> Tensor:
    """Spherical k-means centroids `(…, count, D)` of unit-length `x (…, N, D)`, from evenly spaced tokens on."""
    if count > x.shape[-2]:
        raise ValueError(f"count must be at most the number of tokens {x.shape[-2]}, got {count}")
    centroids = x[..., torch.linspace(0, x.shape[-2] - 1, count).long(), :]
    for _ in range(rounds):
        nearest = (x @ centroids.transpose(-1, -2)).argmax(-1)
        sums = (F.one_hot(nearest, count).to(x.dtype).transpose(-1, -2)) @ x
        # An empty cluster keeps its centroid.
        centroids = F.normalize(torch.where(sums.any(-1, keepdim=True), sums, centroids), dim=-1)
    return centroids
