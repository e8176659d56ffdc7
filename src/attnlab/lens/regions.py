"""Connected regions of a map, and the box around a mask: what turns an attention map into places in an image."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor


def ndimage(purpose: str) -> Any:
    """scipy.ndimage, or an error that says how to get it."""
    try:
        return import_module("scipy.ndimage")
    except ImportError as error:
        raise ImportError(f"{purpose} needs the package 'scipy': pip install 'attnlab[data]'") from error


def components(mask: Tensor) -> tuple[Tensor, int]:
    """Labels `(H, W)` of the 4-connected regions of a mask, 1, 2, … in reading order, 0 outside, and their number."""
    if mask.ndim != 2:
        raise ValueError(f"mask must be (H, W), got {tuple(mask.shape)}")
    labels, count = ndimage("finding regions").label(mask.bool().cpu().numpy())
    return torch.from_numpy(labels).long().to(mask.device), int(count)


def bounding_box(mask: Tensor) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of what a mask `(H, W)` covers, right and bottom exclusive; of nothing, all of it."""
    rows, columns = torch.where(mask)
    if not len(rows):
        return 0, 0, mask.shape[1], mask.shape[0]
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
