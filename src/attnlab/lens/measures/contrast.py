"""Contrastive maps: what attention to an image the question asks for, beyond what any prompt would draw (CARVE).

Source: arXiv 2509.06461 (YuyaoGe/CARVE).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.lens.regions import components


def contrast(query: Tensor, general: Tensor, *, eps: float = 1e-8) -> Tensor:
    """a_query / (a_general + eps), entry by entry, of two maps of attention to the same image tokens, any shape.

    Attention is taken to be a product, noise of the image times meaning for the prompt; a general prompt means nothing
    in particular, so the ratio leaves the meaning.
    """
    if query.shape[-1] != general.shape[-1]:
        raise ValueError(f"the maps are of {query.shape[-1]} and {general.shape[-1]} image tokens")
    return query / (general + eps)


def fuse(
    query: Tensor,
    general: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int],
    *,
    eps: float = 1e-8,
    steps: Literal["all", "first"] = "all",
) -> Tensor:
    """One contrastive map over the image, `(H, W)` of `size`, float64:

        S = enlarge( Σ_t t Σ_layers query_tl / (general_tl + eps) ),   t = 1, 2, … while both generate

    query, general (T, L, V): at each step, in each layer, the last row of attention to the V image tokens, mean over
    heads; the T may differ. steps="first" takes the first alone. Enlarging is linear, so it is done once, after the
    sums: cost T L V + H W. Layers are not brought to one range, so those with small denominators weigh most.
    """
    if query.ndim != 3 or general.ndim != 3 or query.shape[1:] != general.shape[1:]:
        raise ValueError(
            f"query and general must be (T, L, V) of the same layers and tokens, got {tuple(query.shape)}, "
            f"{tuple(general.shape)}"
        )
    if grid[0] * grid[1] != query.shape[2]:
        raise ValueError(f"grid {grid} does not hold {query.shape[2]} image tokens")
    if steps not in ("all", "first"):
        raise ValueError(f"steps must be 'all' or 'first', got {steps!r}")
    count = min(len(query), len(general)) if steps == "all" else 1
    ratios = contrast(query[:count], general[:count], eps=eps).double().sum(1)
    weights = torch.arange(1, count + 1, dtype=ratios.dtype, device=ratios.device)
    fused = (weights @ ratios).view(1, 1, *grid)
    return F.interpolate(fused, size=size, mode="bilinear", antialias=True)[0, 0]


def keep_regions(
    scores: Tensor,
    *,
    fraction: float = 0.2,
    rank: Literal["sum", "area", "specks"] = "sum",
    least: int = 3,
    specks: float = 0.1,
) -> Tensor:
    """The mask `(H, W)` of the best connected regions among the `fraction` of `scores` (H, W) that is largest.

    rank="sum" or "area": of n regions, the max(least, ⌊n · fraction⌋) with the most score, or area, are kept;
    rank="specks": all but those smaller than `specks` percent of the whole area above the threshold.
    """
    if scores.ndim != 2 or not bool(scores.isfinite().all()):
        raise ValueError(f"scores must be (H, W) and finite, got {tuple(scores.shape)}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    if rank not in ("sum", "area", "specks"):
        raise ValueError(f"rank must be 'sum', 'area' or 'specks', got {rank!r}")
    values = scores.detach().double()
    # numpy's, because torch.quantile takes no more than 2²⁴ entries.
    above = values >= float(np.percentile(values.cpu().numpy(), (1 - fraction) * 100))
    labels, count = components(above)
    of = labels[above]
    areas = torch.bincount(of, minlength=count + 1)[1:]
    if rank == "specks":
        kept = areas >= int(int(above.sum()) * specks / 100)
    else:
        worth = areas if rank == "area" else torch.bincount(of, values[above], minlength=count + 1)[1:]
        best = worth.argsort(descending=True, stable=True)[: max(least, int(count * fraction))]
        kept = torch.zeros(count, dtype=torch.bool, device=scores.device).index_fill_(0, best, True)
    return F.pad(kept, (1, 0))[labels]


def map_entropy(maps: Tensor) -> Tensor:
    """−Σ_v a_v log a_v over the image tokens of maps (…, V): it falls with depth and rises with the image's texture."""
    return torch.special.entr(maps).sum(-1)


def square_grid(tokens: int) -> tuple[int, int]:
    """(side, side) of a square grid of so many tokens; a model with another grid has to say so."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{tokens} image tokens are no square: give grid=(rows, columns)")
    return side, side
