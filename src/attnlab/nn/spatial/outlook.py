"""Outlook attention (VOLO): each token predicts, alone, how the values of its neighbourhood are to be mixed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.mechanism import OnGrid, check_heads


@register(
    Card(
        name="outlook",
        title="VOLO: Vision Outlooker for Visual Recognition",
        paper="2106.13112",
        system="volo",
        family="spatial",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_GRID,
        cost="N k⁴",
        growth=1.0,
        sample={"heads": 4},
    )
)
class OutlookAttention(OnGrid):
    """Mixes each k×k window by weights that one linear layer reads off the window's centre token: no query meets a key.

        A = softmax(scale · Wa pool(x))      one k²×k² matrix per window and head
        y = Wo fold(A · unfold(Wv x))        windows overlap; what they write to a pixel is summed, not averaged

    x (B, H·W, C) with grid=(H, W) → the same shape. Windows stand `stride` apart, ⌈H/s⌉·⌈W/s⌉ of them; `pool` averages
    the s×s tokens that a window stands for. Cost: 2NC² + N/s² · k⁴ (h+1) C. Source: arXiv 2106.13112 (sail-sg/volo).

    The rows of `attn` are ordered (value slot, head, output slot), so that the softmax runs over a strided axis: that
    vectorises, where a contiguous axis of 9 does not (6 times faster). The authors' order is (head, output, value).
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        kernel: int = 3,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim)
        if causal:
            raise ValueError("causal must be False: outlook attention mixes whole windows")
        head_dim = check_heads(dim, heads)[1]
        if kernel < 1 or stride < 1:
            raise ValueError(f"kernel and stride must be at least 1, got kernel={kernel}, stride={stride}")
        self.heads, self.kernel, self.stride = heads, kernel, stride
        self.padding = (kernel - 1) // 2 if padding is None else padding
        self.scale = head_dim**-0.5 if scale is None else scale
        self.dropout = dropout
        self.wv = nn.Linear(dim, dim, bias=bias)
        self.attn = nn.Linear(dim, kernel**4 * heads)
        self.wo = nn.Linear(dim, dim)

    def over_grid(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        maps = x.unflatten(1, grid)
        weights = self.weights(maps)
        values = Unfold.apply(self.wv(maps), self.heads, self.kernel, self.stride, self.padding)
        if weights.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"padding={self.padding} gives {tuple(values.shape[1:3])} windows, on grid {grid} stride {self.stride} "
                f"wants {tuple(weights.shape[1:3])}; use padding = (kernel - 1) // 2"
            )
        mixed = F.dropout(weights, self.dropout, self.training) @ values
        return self.wo(Fold.apply(mixed, grid, self.kernel, self.stride, self.padding).flatten(1, 2))

    def weights(self, maps: Tensor) -> Tensor:
        """The predicted mixing matrices, rows summing to 1: maps (B, H, W, C) → (B, ⌈H/s⌉, ⌈W/s⌉, heads, k², k²)."""
        if self.stride > 1:
            pooled = F.avg_pool2d(maps.movedim(-1, 1), self.stride, ceil_mode=True)
            maps = pooled.movedim(1, -1)
        slots = self.kernel**2
        scores = (self.attn(maps) * self.scale).unflatten(-1, (slots, self.heads, slots))
        return scores.softmax(3).permute(0, 1, 2, 4, 5, 3)  # (…, value, head, out) → (…, head, out, value)


class Unfold(torch.autograd.Function):
    """Windows of a map, heads apart: (B, H, W, C) → (B, nh, nw, heads, k², C/heads), in one copy.

    `Fold` is its adjoint, so each is the other's backward, of any order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int, kernel: int, stride: int, padding: int) -> Tensor:
        ctx.rest = (tuple(x.shape[1:3]), kernel, stride, padding)
        x = F.pad(x, (0, 0, padding, padding, padding, padding)).unflatten(-1, (heads, -1))
        windows = x.unfold(1, kernel, stride).unfold(2, kernel, stride)  # (B, nh, nw, heads, D, k, k), a view
        return windows.permute(0, 1, 2, 3, 5, 6, 4).flatten(4, 5)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return Fold.apply(grad, *ctx.rest), None, None, None, None


class Fold(torch.autograd.Function):
    """Overlap-sum of windows into a map: (B, nh, nw, heads, k², D) → (B, H, W, heads·D); the adjoint of `Unfold`."""

    @staticmethod
    def forward(ctx: Any, windows: Tensor, grid: tuple[int, int], kernel: int, stride: int, padding: int) -> Tensor:
        batch, down, across, heads, _, width = windows.shape
        ctx.rest = (heads, kernel, stride, padding)
        windows = windows.unflatten(4, (kernel, kernel)).permute(0, 1, 4, 2, 5, 3, 6)
        # Pieces of windows that are `stride` wide do not overlap: all windows' pieces at one place add up at once.
        pieces = range(0, kernel, stride)
        height, length = (n + len(pieces) - 1 for n in (down, across))
        out = windows.new_zeros(batch, height, stride, length, stride, heads, width)
        for i in pieces:
            for j in pieces:
                piece = windows[:, :, i : i + stride, :, j : j + stride]
                rows, columns = slice(i // stride, i // stride + down), slice(j // stride, j // stride + across)
                out[:, rows, : piece.shape[2], columns, : piece.shape[4]] += piece
        out = out.flatten(3, 4).flatten(1, 2)
        edges = [grid[axis] + padding - out.shape[axis + 1] for axis in (0, 1)]
        if max(edges) > 0:  # windows need not reach the end of the map
            out = F.pad(out, (0, 0, 0, 0, 0, max(edges[1], 0), 0, max(edges[0], 0)))
        return out[:, padding : padding + grid[0], padding : padding + grid[1]].flatten(3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return Unfold.apply(grad, *ctx.rest), None, None, None, None
