"""Patterns as text, for the terminal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.patterns.base import Pattern

_SHADES = " ░▒▓█"


def draw(pattern: Pattern, nq: int, nk: int | None = None, *, width: int = 64) -> str:
    """`pattern` over `nq` queries (down) and `nk` keys (across), at most `width` characters wide.

    A character is one pair (█ seen, · not), or the density of a cell of pairs where the matrix is larger.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    seen = pattern.matrix(nq, nk)
    if seen.dim() == 4:
        seen = seen[0, 0]
    cell = -(-max(seen.shape) // width)
    if cell == 1:
        return "\n".join("".join("█" if s else "·" for s in row) for row in seen.tolist())
    return "\n".join("".join(_SHADES[i] for i in row) for row in _shades(seen, cell).tolist())


def _shades(seen: Tensor, cell: int) -> Tensor:
    share = F.avg_pool2d(seen[None, None].float(), cell, ceil_mode=True)[0, 0]
    return torch.ceil(share * (len(_SHADES) - 1)).long()
