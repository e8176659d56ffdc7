"""Number an image's tokens by rings from its border to its centre, and let attention follow (CCA)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.patterns import Pattern


def rings(height: int, width: int, *, device: torch.device | str | None = None) -> Tensor:
    """The ring of each token of a grid, `(height, width)`: 0 at the border, largest in the centre.

        ring(i, j) = min(i, j, height − 1 − i, width − 1 − j)

    Any grid; the paper's is 24 × 24, with 12 rings of 92, 84, … 4 tokens. The centre of an odd square is one token.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height} and {width}")
    i, j = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.minimum(torch.minimum(i, height - 1 - i)[:, None], torch.minimum(j, width - 1 - j))


def depth(grid: tuple[int, int]) -> int:
    """How many rings a grid has, and so how many positions its tokens take: half its shorter side, rounded up."""
    return (min(grid) + 1) // 2


def positions(length: int, start: int, grid: tuple[int, int], *, offset: int = 0) -> Tensor:
    """Positions `(length)` of the tokens from `offset` on, of a text whose image begins at `start`, row-major.

        text before: 0, 1, …, start − 1;  image: start + ring;  text after: start + R, start + R + 1, …

    R = `depth(grid)`. A token decoded after L others (V of them the image) stands at L − V + R, not at L.
    """
    at = torch.arange(offset, offset + length)
    size = math.prod(grid)
    ring = rings(*grid).flatten()
    within = start + ring[(at - start).clamp(0, size - 1)]
    return torch.where(at < start, at, torch.where(at < start + size, within, at - size + depth(grid)))


@dataclass(frozen=True)
class ConcentricCausal(Pattern):
    """Causal over the text; a token of the image (at `start`, `grid` row-major) sees its own ring and those outside it.

    What comes before the image is seen by all of it, and the text after it sees it whole. arXiv 2410.15926.
    """

    start: int
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        if self.start < 0 or len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"start must be 0 or more and grid (height, width), got {self.start} and {self.grid}")

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        ring = rings(*self.grid, device=q.device).flatten()
        i, j = q - self.start, k - self.start
        inside = (i >= 0) & (i < len(ring)) & (j >= 0) & (j < len(ring))
        last = len(ring) - 1
        return torch.where(inside, ring[j.clamp(0, last)] <= ring[i.clamp(0, last)], k <= q)
