"""How far each head of an image model looks: attention by hops on the grid of patches (arXiv 2303.13731)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HOPS = ("chebyshev", "manhattan", "euclidean")


@dataclass(frozen=True, eq=False)
class Strength:
    """Attention by hop, of queries and keys that are patches. `K` hops from 0 (the patch itself), `n` patches.

    `sum (…, K)`: what the patches of a ring receive together, mean over images and queries. With `prefix_share (…)`,
    what the class token receives, it adds up to 1 unless rows were renormalised.
    `mean (…, K)`: what one patch of a ring receives, over the queries that have such a ring. Uniform attention has it
    constant, which is why it stands beside the sum: rings grow with k, and the border cuts them.
    `query_sum`, `query_mean (…, n, K)`: the same for each query; 0 where a query has no such ring.
    """

    sum: Tensor
    mean: Tensor
    query_sum: Tensor
    query_mean: Tensor
    prefix_share: Tensor
    hop: str

    @property
    def distance(self) -> Tensor:
        """Expected hops Σ k·sum_k / Σ sum_k, `(…)`; 0 where no patch is seen."""
        return _expected(self.sum)

    @property
    def query_distance(self) -> Tensor:
        """The same for each query, `(…, n)`: a map over the image."""
        return _expected(self.query_sum)

    def profile(self, what: str = "sum") -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over heads of `sum`, `mean` or `distance`: the trend over layers and its spread.

        Heads are the last leading axis: `(L, H, K)` gives two of `(L, K)`, and distance two of `(L,)`.
        """
        if what not in ("sum", "mean", "distance"):
            raise ValueError(f"what must be sum, mean or distance, got {what!r}")
        values, axis = (self.distance, -1) if what == "distance" else (getattr(self, what), -2)
        return values.mean(axis), values.std(axis, correction=0)


def hops(grid: tuple[int, int], hop: str = "chebyshev", *, device: torch.device | None = None) -> Tensor:
    """How many hops apart patches are, `(n, n)` integers; n = H·W, row-major.

    chebyshev: max(|Δrow|, |Δcolumn|), square rings; manhattan: their sum; euclidean: rounded to the nearest integer.
    """
    if hop not in HOPS:
        raise ValueError(f"hop must be one of {', '.join(HOPS)}, got {hop!r}")
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid must be (rows, columns), got {grid}")
    place = torch.arange(math.prod(grid), device=device)
    rows, columns = place // grid[1], place % grid[1]
    down, across = (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()
    if hop == "chebyshev":
        return torch.maximum(down, across)
    return down + across if hop == "manhattan" else (down**2 + across**2).double().sqrt().round().long()


def strength(
    weights: Tensor,
    grid: tuple[int, int],
    *,
    prefix: int | None = None,
    hop: str = "chebyshev",
    renormalise: bool = False,
) -> Strength:
    """Attention by hop of `weights (images, …, N, N)`, N = prefix + rows·columns; sees each weight once: O(images·N²).

    Args:
        prefix: class and register tokens before the patches; N − rows·columns if not given. They are left out as
            queries and as keys.
        hop: the measure of `hops`.
        renormalise: rows are scaled to sum to 1 over the patches. In late layers the class token takes much of a row;
            by default that shows as less strength at all hops.
    """
    patches, share = _patches(weights, grid, prefix)
    if renormalise:
        patches = patches / patches.sum(-1, keepdim=True).clamp_min(torch.finfo(patches.dtype).tiny)
    ring = hops(grid, hop, device=weights.device)
    count = int(ring.max()) + 1
    members = torch.zeros(len(ring), count, dtype=patches.dtype, device=ring.device)
    members.scatter_add_(1, ring, torch.ones_like(ring, dtype=patches.dtype))
    per_query = patches.new_zeros(*patches.shape[:-1], count)
    per_query.scatter_add_(-1, ring.expand(patches.shape), patches)
    per_query = per_query.mean(0)  # over images; the mean over a ring's members commutes with it
    per_member = per_query / members.clamp_min(1)
    having = (members > 0).sum(0)
    return Strength(per_query.mean(-2), per_member.sum(-2) / having, per_query, per_member, share, hop)


def _patches(weights: Tensor, grid: tuple[int, int], prefix: int | None) -> tuple[Tensor, Tensor]:
    """Patch-to-patch attention, and the share that the tokens before the patches receive of the patches' rows."""
    if weights.ndim < 3 or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"weights must be (images, …, N, N), got {tuple(weights.shape)}")
    n, tokens = math.prod(grid), weights.shape[-1]
    before = tokens - n if prefix is None else prefix
    if before < 0 or before + n != tokens:
        given = "" if prefix is None else f" after {prefix} other tokens"
        raise ValueError(f"grid {tuple(grid)} has {n} patches{given}, but weights have {tokens} tokens")
    rows = weights[..., before:, :].to(torch.promote_types(weights.dtype, torch.float32))
    return rows[..., before:], rows[..., :before].sum(-1).mean((0, -1))


def _expected(strength: Tensor) -> Tensor:
    steps = torch.arange(strength.shape[-1], dtype=strength.dtype, device=strength.device)
    return (strength * steps).sum(-1) / strength.sum(-1).clamp_min(torch.finfo(strength.dtype).tiny)
