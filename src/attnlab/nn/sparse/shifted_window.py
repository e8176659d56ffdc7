"""Shifted windows (Swin): softmax attention inside the windows of a grid, with a learned bias per displacement."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.attend import attend
from attnlab.cards import ANY_GRID, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.fused import linear
from attnlab.nn.mechanism import OnGrid, split_heads
from attnlab.nn.multihead import MultiHead
from attnlab.positions.bias import Displacement, TableBias


@register(
    Card(
        name="shifted_window",
        title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
        paper="2103.14030",
        family="sparse",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_GRID,
        cost="N w²",
        growth=1.0,
        sample={"heads": 4, "window": 4, "shift": 2},
    )
)
class ShiftedWindow(OnGrid, MultiHead):
    """Attention within w×w windows; every other block shifts them by half, so that information crosses their borders.

        y_i = Wo Σ_j softmax_j(q_i·k_j / √D + table[place(i) − place(j)]) v_j        j in the window of i

    x (B, H·W, C) with grid=(H, W) → the same shape, any grid: windows at the lower and right edge may be smaller. The
    shift is a roll, and windows that it makes of two opposite edges keep the two apart. A grid no larger than the
    window on one side is not shifted, and its window is that side (as the authors do). Cost: 4NC² + 2Nw²C.
    Source: arXiv 2103.14030 (microsoft/Swin-Transformer).
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 7,
        shift: int = 0,
        bias: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        if causal:
            raise ValueError("causal must be False: a window is seen whole")
        if not 0 <= shift < window:
            raise ValueError(f"shift must be in [0, window = {window}), got {shift}")
        super().__init__(dim, heads=heads, bias=bias, out_bias=True, dropout=dropout)
        self.window, self.shift = window, shift
        self.relative = TableBias((window, window), heads)

    def over_grid(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        height, width = grid
        window = min(self.window, height, width)
        shift = 0 if min(height, width) <= self.window else self.shift
        below, right = -height % window, -width % window
        rows, columns = (height + below) // window, (width + right) // window

        def windows(maps: Tensor, fill: float = 0.0) -> Tensor:
            """(B, H, W, C) → (B, windows, w², C): padded, rolled and cut."""
            maps = F.pad(maps, (0, 0, 0, right, 0, below), value=fill).roll((-shift, -shift), (1, 2))
            tiles = maps.unflatten(2, (columns, window)).unflatten(1, (rows, window)).transpose(2, 3)
            return tiles.flatten(3, 4).flatten(1, 2)

        places = torch.arange(window, device=x.device)
        places = (places[:, None] * self.window + places).flatten()
        rows_of_table = Displacement(self.relative.window)(places[:, None], places)
        bias = self.relative.table[rows_of_table].movedim(-1, 0)
        tiles = windows(linear(x, self.wqkv).unflatten(1, (height, width))).flatten(0, 1)
        q, k, v = (split_heads(t, self.heads) for t in tiles.chunk(3, dim=-1))
        if shift or below or right:
            # What the roll brought round an edge is a region of its own, so is the padding; each sees its own kind.
            down, across = (torch.arange(n, device=x.device) < shift for n in (height, width))
            region = windows((2 * down[:, None] + across).to(x)[None, :, :, None], fill=4.0)[0]
            apart = region != region.transpose(1, 2)
            bias = bias.masked_fill(apart[:, None], -math.inf).flatten(0, 1)
            q, k, v = (t.unflatten(0, (len(x), -1)).flatten(1, 2) for t in (q, k, v))
        heads = attend(q, k, v, bias=bias, dropout=self.dropout if self.training else 0.0)
        tiles = heads.reshape(len(x), rows, columns, self.heads, window, window, -1)
        maps = tiles.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4).flatten(1, 2)
        maps = maps.roll((shift, shift), (1, 2))[:, :height, :width]
        return linear(maps.flatten(1, 2), self.wo)
