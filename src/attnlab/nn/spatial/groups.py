"""Groups of a map's tokens, side by side or spread, and softmax attention inside them: what many backbones are made of.

windows of Swin and DaViT        size 7, step 1
grid attention (MaxViT)          size 7, step H/7: the groups are spread over the whole map
long distance (CrossFormer)      size 7, step 4
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.nn.by_rows import by_rows
from attnlab.nn.kept import Kept
from attnlab.nn.mechanism import OnGrid
from attnlab.nn.multihead import MultiHead
from attnlab.positions.bias import TableBias


@dataclass(frozen=True)
class Groups:
    """A map cut into groups of `size` tokens that stand `step` apart, for each axis.

    Axis by axis the map is regions of size·step, and the tokens of a region with the same rest modulo `step` are a
    group. The map is filled up at its lower and right edge where the regions do not divide it.
    """

    grid: tuple[int, int]
    size: tuple[int, int]
    step: tuple[int, int] = (1, 1)

    @staticmethod
    def spread(grid: tuple[int, int], size: tuple[int, int]) -> Groups:
        """Groups each of which spans the map: as many steps apart as it takes."""
        down, across = (-(-n // s) for n, s in zip(grid, size, strict=True))
        return Groups(grid, size, (down, across))

    @property
    def filling(self) -> tuple[int, int]:
        """Rows and columns that are missing to whole regions."""
        down, across = (-n % (s * t) for n, s, t in zip(self.grid, self.size, self.step, strict=True))
        return down, across

    @property
    def count(self) -> int:
        """Groups of one map."""
        tokens = (self.grid[0] + self.filling[0]) * (self.grid[1] + self.filling[1])
        return tokens // (self.size[0] * self.size[1])

    def cut(self, maps: Tensor, fill: float = 0.0) -> Tensor:
        """`(B, H, W, C)` to `(B · count, tokens of a group, C)`, row-major in a group."""
        down, across = self.filling
        if down or across:
            maps = F.pad(maps, (0, 0, 0, across, 0, down), value=fill)
        tiles = maps.unflatten(2, (-1, self.size[1], self.step[1])).unflatten(1, (-1, self.size[0], self.step[0]))
        tiles = tiles.permute(0, 1, 4, 3, 6, 2, 5, 7)  # image, regions, steps, places
        return tiles.reshape(-1, self.size[0] * self.size[1], maps.shape[-1])

    def join(self, tiles: Tensor) -> Tensor:
        """Undo `cut`: `(B · count, tokens of a group, C)` to `(B, H, W, C)`, without what was filled in."""
        down, across = self.filling
        rows = (self.grid[0] + down) // (self.size[0] * self.step[0])
        columns = (self.grid[1] + across) // (self.size[1] * self.step[1])
        maps = tiles.reshape(-1, rows, columns, *self.step, *self.size, tiles.shape[-1])
        maps = maps.permute(0, 1, 5, 3, 2, 6, 4, 7).flatten(4, 6).flatten(1, 3)
        return maps[:, : self.grid[0], : self.grid[1]] if down or across else maps

    def real(self, like: Tensor) -> Tensor:
        """`(count, tokens of a group)`, True where a token is of the map and not filled in; on the device of `like`."""
        return self.cut(torch.ones(1, *self.grid, 1, device=like.device, dtype=like.dtype))[..., 0] > 0


class GroupAttention(OnGrid, MultiHead):
    """Softmax attention inside the groups of a map; a subclass says how it is cut.

        y_i = Wo Σ_j softmax_j(q_i·k_j / √D + table[place(i) − place(j)]) v_j        j in the group of i

    x (B, H·W, C) with grid=(H, W) → the same shape, any grid. Cost: 4NC² + 2Nw²C for groups of w² tokens.

    Args:
        window: w, on each axis. biased: whether there is a learned bias per displacement within a group.
        see_filling: where groups do not divide the map, let tokens see the zeros that fill it up (their keys and values
            are the biases of the projection), as Swin and DaViT do at their edges. By default they are not seen.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 7,
        bias: bool = True,
        out_bias: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
        biased: bool = True,
        see_filling: bool = False,
    ) -> None:
        if causal:
            raise ValueError("causal must be False: a group is seen whole")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        super().__init__(dim, heads=heads, bias=bias, out_bias=out_bias, dropout=dropout)
        self.window, self.see_filling = window, see_filling
        self.relative: nn.Module | None = TableBias((window, window), heads) if biased else None
        self._kept = Kept()

    def rewindow(self, window: int) -> None:
        """Go on with another window: the learned bias is interpolated bilinearly."""
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if self.relative is not None:
            self.relative.resize((window, window))  # type: ignore[operator]
        self.window = window

    def groups(self, grid: tuple[int, int]) -> Groups:
        """How a map of this size is cut."""
        return Groups(grid, (self.window, self.window))

    def relative_bias(self, groups: Groups) -> Tensor:
        """`(heads, n, n)` between the n places of a group."""
        return self.relative.matrix()  # type: ignore[operator, union-attr]

    def bias(self, groups: Groups) -> Tensor | None:
        """`relative_bias` if there is one; without gradients it is kept for the next call with the same parameters."""
        if self.relative is None:
            return None
        return self._kept(groups.size, self.relative.parameters(), lambda: self.relative_bias(groups))

    def score_bias(self, groups: Groups, like: Tensor) -> Tensor | None:
        """What is added to the scores, broadcastable to `(B · groups, heads, n, n)`."""
        bias = self.bias(groups)
        bias = None if bias is None else bias.to(like.dtype)[None]
        if self.see_filling or not any(groups.filling):
            return bias
        # Finite, so that a group without any token of the map stays finite in the backward pass too.
        unseen = (~groups.real(like))[:, None, None].to(like.dtype) * torch.finfo(like.dtype).min
        bias = unseen.expand(-1, 1, unseen.shape[-1], -1) if bias is None else unseen + bias
        return bias.repeat(len(like) // groups.count, 1, 1, 1)

    def over_grid(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        height, width = grid
        groups = self.groups((height, width))
        tiles, dropout = groups.cut(x.unflatten(1, (height, width))), self.dropout if self.training else 0.0
        bias = self.score_bias(groups, tiles)
        if bias is not None and len(bias) > 1:  # not the same for all groups
            return self.within(groups, *self.qkv(tiles))

        def inside(tiles: Tensor) -> Tensor:
            q, k, v = self.qkv(tiles)
            return self.merge(attend(q, k, v, bias=None if bias is None else bias.to(q.dtype), dropout=dropout))

        return groups.join(by_rows(inside, tiles, through=(self.wqkv, self.wo), axes=2)).flatten(1, 2)

    def within(self, groups: Groups, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention inside each group, joined to tokens `(B, H·W, C)`; q, k and v are `(B · groups, heads, n, D)`."""
        heads = attend(q, k, v, bias=self.score_bias(groups, q), dropout=self.dropout if self.training else 0.0)
        return groups.join(self.merge(heads)).flatten(1, 2)
