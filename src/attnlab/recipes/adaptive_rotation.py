"""A crop that asks for more: the window of an image whose patches look most alike within is turned in place (RoMA)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.cards import RECIPE, Card, register

# Neighbours of a pixel as (row, column), the lowest bit first.
_AROUND = ((-1, -1), (0, -1), (1, -1), (-1, 0), (1, 0), (-1, 1), (0, 1), (1, 1))


class Window(NamedTuple):
    """A square of patches: its first row and column, and its side."""

    top: int
    left: int
    side: int


class Rotated(NamedTuple):
    """The image `(C, H, W)` with its window turned, which window it was, and by how many degrees."""

    image: Tensor
    window: Window
    degrees: float


def texture(image: Tensor, patch: int = 16) -> Tensor:
    """How concentrated the local binary patterns of each patch are: `(C, H, W)` to `(H/patch, W/patch)`.

    A pixel's code has a bit for each of its 8 neighbours in the patch that is at least as bright (channels averaged;
    border pixels have code 0); the score is the length |h| of the histogram of codes, 255 bins of which the last holds
    254 and 255. It is largest where one pattern repeats.
    """
    if image.ndim != 3 or image.shape[1] % patch or image.shape[2] % patch:
        raise ValueError(f"image must be (C, H, W), sides multiples of patch={patch}, got {tuple(image.shape)}")
    if patch < 3:
        raise ValueError(f"patch must be at least 3, got {patch}")
    gray = image.mean(0).unflatten(1, (-1, patch)).unflatten(0, (-1, patch)).transpose(1, 2)
    middle = gray[..., 1:-1, 1:-1]
    codes = torch.zeros_like(middle, dtype=torch.long)
    for bit, (row, column) in enumerate(_AROUND):
        neighbour = gray[..., 1 + row : patch - 1 + row, 1 + column : patch - 1 + column]
        codes += (neighbour >= middle).long() << bit
    codes = F.pad(codes, (1, 1, 1, 1)).flatten(2).clamp_(max=254)
    counts = torch.zeros(*codes.shape[:2], 255).scatter_add_(2, codes, torch.ones_like(codes, dtype=torch.float32))
    return (counts / patch**2).norm(dim=2)


def choose_window(scores: Tensor, sides: tuple[int, ...] = (6, 4, 2)) -> Window:
    """The best-scoring window near the best-scoring patch, of the largest side that is worth it.

    Of each side in turn, the windows that begin fewer than `side` patches from the best patch; the best of them is
    taken if its mean score reaches the mean of all patches, and the last side's in any case.
    """
    height, width = scores.shape
    fitting = [side for side in sides if side <= min(height, width)]
    if not fitting:
        raise ValueError(f"sides must have one that the {height}×{width} patches hold, got {sides}")
    # The first of equals, on any machine.
    best = int((scores == scores.max()).flatten().nonzero()[0])
    row, column = divmod(best, width)
    for side in fitting:
        means = F.avg_pool2d(scores[None, None], side, 1)[0, 0]
        top, left = max(0, row - side + 1), max(0, column - side + 1)
        near = means[top : row + side, left : column + side]
        at = int((near == near.max()).flatten().nonzero()[0])
        window = Window(top + at // near.shape[1], left + at % near.shape[1], side)
        if near.max() >= scores.mean():
            break
    return window


def turned(square: Tensor, degrees: float) -> Tensor:
    """`square` (C, S, S) counter-clockwise about its centre, by the nearest pixel; what comes from outside is 0."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = square.new_tensor([[cos, -sin, 0.0], [sin, cos, 0.0]])
    grid = F.affine_grid(matrix[None], [1, *square.shape], align_corners=False)
    return F.grid_sample(square[None], grid, mode="nearest", align_corners=False)[0]


def places(window: Window, grid: tuple[int, int], *, variant: str = "paper") -> Tensor:
    """Which patches of `grid` the window covers: `(H·W)` bool, for the angle embedding.

    "release" is what the authors' code marks: the first `side` places of the grid's diagonal, wherever the window is.
    """
    if variant not in ("paper", "release"):
        raise ValueError(f"variant must be 'paper' or 'release', got {variant!r}")
    marked = torch.zeros(grid, dtype=torch.bool)
    if variant == "release":
        marked.diagonal()[: window.side] = True
    else:
        marked[window.top : window.top + window.side, window.left : window.left + window.side] = True
    return marked.flatten()


@register(
    Card(
        name="adaptive_rotation",
        title="RoMA: Scaling up Mamba-based Foundation Models for Remote Sensing",
        paper="2503.10392",
        system="roma",
        family="augmentation",
        kind=RECIPE,
        cost="H W",
    )
)
def adaptive_rotation(
    image: Tensor,
    *,
    patch: int = 16,
    sides: tuple[int, ...] = (6, 4, 2),
    degrees: float = 45.0,
    generator: torch.Generator | None = None,
) -> Rotated:
    """Turns the most patterned window of an image, seen from above, by a random angle: objects there have no up.

        rotated = adaptive_rotation(image)                                     image (C, H, W), which is left as it was
        loss = pretraining(rotated.image[None], image[None], places(rotated.window, (12, 12))[None])

    Patches are scored by `texture`, the window is that of `choose_window`. (The authors' code scores scrambled patches
    and swaps rows and columns; this is the procedure of the paper.) Source: arXiv 2503.10392.

    Args:
        sides: of windows, in patches, the largest first (96, 64 and 32 pixels).
        degrees: the angle is uniform in [−degrees, degrees].
    """
    window = choose_window(texture(image, patch), sides)
    angle = degrees * (2 * torch.rand((), generator=generator).item() - 1)
    rows = slice(patch * window.top, patch * (window.top + window.side))
    columns = slice(patch * window.left, patch * (window.left + window.side))
    result = image.clone()
    result[:, rows, columns] = turned(image[:, rows, columns], angle)
    return Rotated(result, window, angle)
