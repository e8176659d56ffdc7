"""Super token attention: pixels gather in soft superpixels, these attend to each other, and pixels read them back."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, FEATURES, Card, register
from attnlab.nn.multihead import MultiHead

EPSILON = 1e-12  # a super token may be nobody's


class Sampled(NamedTuple):
    """Super tokens and whose they are."""

    tokens: Tensor  # (B, h, w, C)
    association: Tensor  # (B, h·w, pixels of a cell, 9): each pixel's shares in the super tokens around its cell


def around(tokens: Tensor) -> Tensor:
    """The 3×3 super tokens around each, row by row, zeros beyond the border: (B, h, w, C) → (B, h·w, 9, C)."""
    height, width = tokens.shape[1:3]
    padded = F.pad(tokens, (0, 0, 1, 1, 1, 1))
    near = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return torch.stack(near, 3).flatten(1, 2)


def collect(parts: Tensor, grid: tuple[int, int]) -> Tensor:
    """What each super token is given by the cells around it: the adjoint of `around`, (B, h·w, 9, C) → (B, h, w, C)."""
    height, width = grid
    padded = F.pad(parts.unflatten(1, grid), (0, 0, 0, 0, 1, 1, 1, 1))
    given = [padded[:, 2 - i : 2 - i + height, 2 - j : 2 - j + width, 3 * i + j] for i in range(3) for j in range(3)]
    return torch.stack(given).sum(0)


@register(
    Card(
        name="super_tokens",
        title="Vision Transformer with Super Token Sampling",
        paper="2211.11167",
        system="stvit",
        family="tokens",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N + (N/hw)²",
        sample={"heads": 4, "cell": 2},
    )
)
class SuperTokens(nn.Module):
    """Attention of a whole map for the price of a few tokens, which follow what is in it like superpixels.

        S = mean of each h×w cell of P                          P the pixels
        Q = softmax_9(P Sᵀ/√C)                                  over the 3×3 super tokens around a pixel's cell
        S_j = Σ_p Q_pj P_p / (Σ_p Q_pj + ε)                     these two lines `steps` times
        y_p = Σ_j Q_pj MultiHead(S)_j

    (B, C, H, W) → the same, any size: zeros are added below and to the right, and take part. No gradient flows through
    Q. Beyond the border lie zero tokens that take their share too. With `cell=1` it is `MultiHead` over all pixels.
    Cost: 27NC steps + 4nC² + 2n²C with n = N/(hw). Source: arXiv 2211.11167 (hhb072/STViT).

    Args:
        cell: h and w. steps: how often tokens and shares are computed in turn.
        bias: in the projection to queries, keys and values.
    """

    def __init__(
        self, dim: int, *, heads: int = 8, cell: int | tuple[int, int] = 8, steps: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.dim, self.steps = dim, steps
        self.cell = (cell, cell) if isinstance(cell, int) else tuple(cell)
        if len(self.cell) != 2 or min(self.cell) < 1:
            raise ValueError(f"cell must be one or two sizes of at least 1, got {cell}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.attention = MultiHead(dim, heads=heads, bias=bias, out_bias=True)

    def cells(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The pixels of (B, H, W, C) by cell, (B, n, h·w, C), filled up with zeros, and how many cells lie each way."""
        h, w = self.cell
        x = F.pad(x, (0, 0, 0, -x.shape[2] % w, 0, -x.shape[1] % h))
        grid = (x.shape[1] // h, x.shape[2] // w)
        return x.unflatten(2, (grid[1], w)).unflatten(1, (grid[0], h)).transpose(2, 3).flatten(3, 4).flatten(1, 2), grid

    def sample(self, pixels: Tensor, grid: tuple[int, int]) -> Sampled:
        """Super tokens of pixels by cell (B, n, h·w, C)."""
        fixed = pixels.detach()
        tokens = fixed.mean(2).unflatten(1, grid)
        for step in range(self.steps):
            shares = (fixed @ around(tokens).mT * self.dim**-0.5).softmax(-1)
            total = collect(shares.sum(2).unsqueeze(-1), grid) + EPSILON
            source = pixels if step == self.steps - 1 else fixed
            tokens = collect(shares.mT @ source, grid) / total
        return Sampled(tokens, shares)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        x = x.permute(0, 2, 3, 1)
        height, width = x.shape[1:3]
        if self.cell == (1, 1):
            return self.attention(x.flatten(1, 2)).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        pixels, grid = self.cells(x)
        tokens, shares = self.sample(pixels, grid)
        tokens = self.attention(tokens.flatten(1, 2)).unflatten(1, grid)
        y = (shares @ around(tokens)).unflatten(1, grid).unflatten(3, self.cell)
        y = y.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return y[:, :height, :width].permute(0, 3, 1, 2)

    @torch.no_grad()
    def segments(self, x: Tensor) -> Tensor:
        """Which super token each pixel belongs to most, (B, C, H, W) → (B, H, W), counted row by row; to look at."""
        pixels, (rows, columns) = self.cells(x.permute(0, 2, 3, 1))
        best = self.sample(pixels, (rows, columns)).association.argmax(-1).unflatten(1, (rows, columns))
        i = torch.arange(rows, device=x.device).view(-1, 1, 1) + best // 3 - 1
        j = torch.arange(columns, device=x.device).view(-1, 1) + best % 3 - 1
        label = (i.clamp(0, rows - 1) * columns + j.clamp(0, columns - 1)).unflatten(3, self.cell).transpose(2, 3)
        return label.flatten(3, 4).flatten(1, 2)[:, : x.shape[2], : x.shape[3]]
