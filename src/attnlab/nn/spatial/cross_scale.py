"""Short- and long-distance attention (CrossFormer): groups of neighbours, or of tokens at an interval."""

from __future__ import annotations

from torch import Tensor

from attnlab.cards import ANY_GRID, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.spatial.groups import GroupAttention, Groups
from attnlab.positions.dynamic import DynamicBias


@register(
    Card(
        name="long_short_distance",
        title="CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention",
        paper="2108.00154",
        system="crossformer",
        family="spatial",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_GRID,
        cost="N w²",
        growth=1.0,
        sample={"heads": 4, "window": 2, "interval": 2, "position_dim": 8},
    )
)
class LongShortDistance(GroupAttention):
    """Attention among w×w tokens, `interval` apart: neighbours at interval 1, far ones within (w·interval)² otherwise.

        y_i = Wo Σ_j softmax_j(q_i·k_j / √D + MLP(place(i) − place(j))) v_j        j in the group of i

    x (B, H·W, C) with grid=(H, W) → the same shape, any grid: it is filled up at its lower and right edge, and the
    filling is not seen. A map no larger than w on one side is cut into groups of that side, and of neighbours; the
    bias, made of displacements by a small network, goes with any size. Cost: 4NC² + 2Nw²C.
    Source: arXiv 2108.00154 (cheerss/CrossFormer).

    Args:
        position_dim: width of the bias's network, C/16 if None (the paper says C/4, the authors' code divides twice).
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 7,
        interval: int = 1,
        position_dim: int | None = None,
        bias: bool = True,
        out_bias: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
        biased: bool = True,
    ) -> None:
        super().__init__(
            dim, heads=heads, window=window, bias=bias, out_bias=out_bias, causal=causal, dropout=dropout, biased=False
        )
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        self.interval = interval
        if biased:
            self.relative = DynamicBias(heads, hidden=max(dim // 16, 1) if position_dim is None else position_dim)

    def groups(self, grid: tuple[int, int]) -> Groups:
        size, whole = min(self.window, *grid), min(grid) <= self.window
        step = 1 if whole else self.interval
        return Groups(grid, (size, size), (step, step))

    def relative_bias(self, groups: Groups) -> Tensor:
        return self.relative.matrix(groups.size)  # type: ignore[operator, union-attr]

    def rewindow(self, window: int) -> None:
        """Go on with another window: the bias goes with any."""
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.window = window
