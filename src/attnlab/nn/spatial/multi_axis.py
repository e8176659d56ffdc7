"""Multi-axis attention (MaxViT): windows of neighbours, and grids of tokens spread over the whole map."""

from __future__ import annotations

from attnlab.cards import ANY_GRID, EXACT, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.spatial.groups import GroupAttention, Groups

_TITLE = "MaxViT: Multi-Axis Vision Transformer"


@register(
    Card(
        name="block_attention",
        title=_TITLE,
        paper="2204.01697",
        system="maxvit",
        family="spatial",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_GRID | EXACT,
        cost="N w²",
        growth=1.0,
        sample={"heads": 4, "window": 4},
        limit=lambda dim, grid: BlockAttention(
            dim, heads=4, window=max(grid), bias=False, out_bias=False, biased=False
        ),
    )
)
class BlockAttention(GroupAttention):
    """Attention among the w×w neighbours in a window, with a learned bias per displacement: local, linear in tokens.

    x (B, H·W, C) with grid=(H, W) → the same shape. Windows that the map does not fill see what there is of it. In the
    limit of one window and no bias it is full attention. Cost: 4NC² + 2Nw²C. Source: arXiv 2204.01697.
    """


@register(
    Card(
        name="grid_attention",
        title=_TITLE,
        paper="2204.01697",
        system="maxvit",
        family="spatial",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_GRID | EXACT,
        cost="N w²",
        growth=1.0,
        sample={"heads": 4, "window": 4},
        limit=lambda dim, grid: GridAttention(dim, heads=4, window=max(grid), bias=False, out_bias=False, biased=False),
    )
)
class GridAttention(GroupAttention):
    """Attention among w×w tokens spread over the whole map, H/w and W/w apart: global reach, linear in tokens.

    x (B, H·W, C) with grid=(H, W) → the same shape. It is `BlockAttention` of the map read with the two factors of
    each side swapped; one after the other, every token reaches every other. Where w does not divide a side, the map is
    filled up and the filling is not seen. With w = H = W and no bias it is full attention. Cost: 4NC² + 2Nw²C.
    Source: arXiv 2204.01697.
    """

    def groups(self, grid: tuple[int, int]) -> Groups:
        return Groups.spread(grid, (self.window, self.window))
