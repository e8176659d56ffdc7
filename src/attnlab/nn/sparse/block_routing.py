"""Mixture-of-block attention for video (VMoBA): each query picks blocks of space and time by their mean key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from attnlab.attend import attend
from attnlab.cards import ANY_GRID, EXACT, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.mechanism import check_grid
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern
from attnlab.routing import Partition, Scope, ThresholdBlocks, TopKBlocks


@register(
    Card(
        name="block_routing",
        title="VMoBA: Mixture-of-Block Attention for Video Diffusion Models",
        paper="2506.23858",
        system="vmoba",
        family="sparse",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_GRID | EXACT,
        cost="N · chosen keys + N · blocks",
        grid_axes=3,
        sample={"heads": 4, "block": (2, 2, 2), "topk": 2},
        limit=lambda dim, grid: BlockRouting(dim, heads=4, block=(2, 2, 2), topk=math.prod(grid)),
    )
)
class BlockRouting(MultiHead):
    """Attention to one's own block of the video and to the blocks whose mean key suits the query.

        g_ic = q_i · mean(k in block c)                          the gate, unscaled, in float32 or wider
        y    = Wo · attend(q, k, v;  i sees own block ∪ chosen(g))

    x `(B, T·H·W, C)` with grid=(T, H, W) → the same shape. The tokens are reordered block by block, and back after the
    attention. Blocks over one axis are runs of frames, over two tiles of the picture through all frames, over three
    cuboids; the paper cycles through the three from layer to layer. Blocks that the grid does not divide are cut
    short at its far sides (the authors refuse them). The choice itself passes no gradient.

    Cost per head: 4 N · (chosen keys) · D and N · (number of blocks) · D for the gate. Every block chosen is full
    attention. Source: arXiv 2506.23858 (KwaiVGI/VMoBA).

    Args:
        block: frames `(c,)` (may be a fraction of one), tile `(h, w)`, or cuboid `(t, h, w)`; or several of these,
            of which `layer` picks one in turn.
        topk: blocks per query, its own among them; or
        threshold: share of the gate's mass that the chosen blocks hold (exactly one of both; default 0.25).
        scope: who shares the budget: "query", "block" (threshold only), "head", "all": see `attnlab.routing`. The
            paper uses "head" with a threshold; the authors' function defaults to "query".
        variant: "release" does as the authors' code: where no query chooses anything beyond its own block it turns to
            full attention, and a threshold that is never reached (1 or more) chooses two blocks in the scopes "query"
            and "block". "paper", the default, stays with own blocks and chooses all: it costs and gives what was asked
            for. (Not followed in either: with `scope="head"` and packed sequences their top-k crosses sequences.)
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        block: Sequence[float] | Sequence[Sequence[float]] = ((1,), (4, 4), (2, 4, 4)),
        layer: int = 0,
        topk: int | None = None,
        threshold: float | None = None,
        scope: Scope = "query",
        variant: Literal["paper", "release"] = "paper",
        causal: bool = False,
        **keywords: Any,
    ) -> None:
        super().__init__(dim, heads=heads, **keywords)
        if causal:
            raise ValueError("causal=True: blocks of space and time have no order; only causal=False exists")
        if topk is not None and threshold is not None:
            raise ValueError(f"give topk or threshold, not both, got topk={topk} and threshold={threshold}")
        if variant not in ("paper", "release"):
            raise ValueError(f"variant must be 'paper' or 'release', got {variant!r}")
        cycle: list[tuple[float, ...]] = [tuple(b) for b in block if isinstance(b, Sequence)]
        cycle = cycle or [tuple(float(b) for b in block)]  # type: ignore[arg-type]
        self.block = cycle[layer % len(cycle)]
        if not 1 <= len(self.block) <= 3 or min(self.block) <= 0:
            raise ValueError(f"block must hold one to three positive sizes, got {self.block}")
        self.topk, self.threshold, self.scope, self.variant = topk, threshold, scope, variant

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Pattern | None = None,
        state: Any = None,
    ) -> Tensor:
        self.refuse(context=context, pattern=pattern, state=state)
        self.check(x)
        grid = check_grid(grid, x.shape[1], axes=3)
        q, k, v = self.project(x, grid=grid if self.on_grid else None)
        order, blocks = block_order(grid, self.block)
        order = order.to(x.device)
        q, k, v = (t.index_select(2, order) for t in (q, k, v))
        y = attend(q, k, v, route=self.route(blocks), dropout=self.dropout if self.training else 0.0)
        return self.merge(torch.empty_like(y).index_copy(2, order, y))

    def route(self, blocks: Partition) -> TopKBlocks | ThresholdBlocks:
        """What chooses, for tokens in the order of `blocks`."""
        options: dict[str, Any] = {
            "block": blocks,
            "query_block": Partition.of(1, blocks.length),
            "scope": self.scope,
            "own": True,
            "released": self.variant == "release",
        }
        if self.topk is not None:
            return TopKBlocks(self.topk, **options)
        return ThresholdBlocks(0.25 if self.threshold is None else self.threshold, **options)


def block_order(grid: tuple[int, ...], block: tuple[float, ...]) -> tuple[Tensor, Partition]:
    """The order `(N,)` that puts the tokens of a video block by block, and the blocks.

    Blocks come by time, row, column, and so do the tokens in each. `(c,)`: the order stays, and blocks are int(c·H·W)
    tokens (which may end inside a frame).
    """
    total = math.prod(grid)
    if len(block) == 1:
        size = int(block[0] * math.prod(grid[1:]))
        if size < 1:
            raise ValueError(f"block {block} holds no whole token of a frame {grid[1:]}")
        return torch.arange(total), Partition.of(size, total)
    frames, rows, columns = (max(int(b), 1) for b in (grid[0],) * (3 - len(block)) + block)
    video = torch.arange(total).view(grid)
    tiles = [tile for time in video.split(frames) for row in time.split(rows, 1) for tile in row.split(columns, 2)]
    return torch.cat([t.flatten() for t in tiles]), Partition.sized([t.numel() for t in tiles])
