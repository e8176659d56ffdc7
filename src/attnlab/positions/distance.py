"""A bias that depends on how far apart two places of a grid are, in any direction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnlab.problem import Lookup


def distance_buckets(distance: Tensor, *, exact: int = 20, last: int = 40, limit: int = 160) -> Tensor:
    """The bucket of each whole `distance` ≥ 0: one each up to `exact`, then on a log scale to `last` at `limit`.

    Source: arXiv 2107.14222 (iRPE's piecewise index function).
    """
    log = torch.log(distance.clamp(min=1) / exact) / math.log(limit / exact)
    far = (exact + log * (last - exact)).round().clamp(max=last)
    return torch.where(distance <= exact, distance, far).long()


class DistanceBias(nn.Module):
    """A learned bias for each head and each bucket of the distance between two places of a grid, 0 at first.

        bias_ij = table[last + bucket(round(|place(i) - place(j)|)), h]        table (2·last + 1, H)

    The same in every direction, and for a grid of any size. Only the rows from `last` on are for distances; the others
    are there because the authors' tables have them. Source: arXiv 2107.14222 ("euclidean", without contexts).
    """

    def __init__(self, heads: int, *, exact: int = 20, last: int = 40, limit: int = 160) -> None:
        super().__init__()
        if not 0 < exact < last or limit <= exact:
            raise ValueError(f"exact must lie below last and limit, got {exact}, {last} and {limit}")
        self.exact, self.last, self.limit = exact, last, limit
        self.table = nn.Parameter(torch.zeros(2 * last + 1, heads))

    def on(self, grid: tuple[int, int]) -> Lookup:
        """The bias between the places of a grid (H, W), row by row."""
        return Lookup(self.table, Distance(grid[1], self.exact, self.last, self.limit))


@dataclass(frozen=True)
class Distance:
    """The row of a `DistanceBias` for two places of a grid that is `width` places wide."""

    width: int
    exact: int
    last: int
    limit: int

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        down, right = q // self.width - k // self.width, q % self.width - k % self.width
        distance = (down * down + right * right).float().sqrt().round()
        return self.last + distance_buckets(distance, exact=self.exact, last=self.last, limit=self.limit)
