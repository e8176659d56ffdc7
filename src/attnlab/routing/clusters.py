"""A route through clusters of the content."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.patterns import Causal, Pattern
from attnlab.routing.blocks import Chosen, Route


@dataclass(frozen=True, eq=False, repr=False)
class Clustered(Chosen):
    """A query sees the keys with which it shares at least one cluster.

    `queries` `(B, H, Nq, clusters)` and `keys` `(B, Hkv, Nk, clusters)`, bool: who is a member of which cluster.
    """

    queries: Tensor
    keys: Tensor

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

    def density(self, nq: int | None = None, nk: int | None = None) -> float:
        """The share of pairs within clusters, over all batches and heads; pairs that share several count for each."""
        repeat = self.queries.shape[1] // self.keys.shape[1]
        pairs = self.queries.sum(2) * self.keys.sum(2).repeat_interleave(repeat, 1)
        return min(1.0, float(pairs.sum(-1).double().mean()) / (self.queries.shape[2] * self.keys.shape[2]))

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

    def select(self, q: Tensor, k: Tensor) -> Pattern:
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = (F.normalize(x.detach().to(wide), dim=-1) for x in (q, k))
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
