"""Axial attention: along one axis of a grid at a time."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, CAUSAL_SELF, NONCAUSAL_SELF, STREAMING, TOKENS, Card, register
from attnlab.nn.cache import GridCache, Owner
from attnlab.nn.mechanism import Mechanism, check_grid
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Axial, SoFar


def along(attention: nn.Module, maps: Tensor, axis: int, **keywords: Any) -> Any:
    """`attention` of tokens on every line of `maps (B, *grid, C)` along one axis of the grid, each line alone.

    The same shape; `(y, state)` if a state is among the keywords, whose batch is then that of the lines.
    """
    lines = maps.movedim(axis + 1, -2)
    out = attention(lines.flatten(0, -3), **keywords)
    y, *state = out if isinstance(out, tuple) else (out,)
    y = y.unflatten(0, lines.shape[:-2]).movedim(-2, axis + 1)
    return (y, *state) if state else y


class Lines(NamedTuple):
    """What is kept of the tokens so far: the keys and values of the attention along each axis."""

    caches: tuple[GridCache, ...]
    owner: Owner


@register(
    Card(
        name="axial",
        title="Axial Attention in Multidimensional Transformers",
        paper="1912.12180",
        system="axial",
        family="sparse",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | CAUSAL_SELF | ANY_GRID | STREAMING,
        cost="N (H + W)",
        state="2 * len(attentions) * attentions[0].heads * attentions[0].head_dim * N",
        sample=dict(heads=4),
    )
)
class AxialAttention(Mechanism):
    """Softmax attention along each axis of the grid, with projections of its own for each.

        y = Σ_a attend_a(x)    or    y = attend_last(… attend_first(x))        attend_a(x)_i: keys on i's line along a

    x (B, N, C) with grid=(H, W), or of any number of axes → the same shape. One layer joins a place to its row and its
    column; two layers, or the axes one after the other, join all places. Causal: along each axis what comes before, so
    in the end nothing that comes later in row-major order, in which it streams, each piece with the whole grid. Cost
    O(N ΣN_a): N^1.5 for a square, where projections no longer outweigh it. Source: arXiv 1912.12180.

    Args:
        axes: how many the grid has.
        combine: "sum" of the axes, or one after the other in "sequence".
        bias: biases in the projections of q, k and v; out_bias: in the output projection.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        axes: int = 2,
        combine: Literal["sum", "sequence"] = "sum",
        bias: bool = False,
        out_bias: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, causal=causal)
        if axes < 1:
            raise ValueError(f"axes must be at least 1, got {axes}")
        if combine not in ("sum", "sequence"):
            raise ValueError(f"combine must be sum or sequence, got {combine!r}")
        self.combine = combine
        self.attentions = nn.ModuleList(
            MultiHead(dim, heads=heads, head_dim=head_dim, bias=bias, out_bias=out_bias, causal=causal, dropout=dropout)
            for _ in range(axes)
        )

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Lines:
        if not self.causal:
            raise ValueError("streaming needs causal=True")
        caches = tuple(GridCache(owner=a.owner(batch)) for a in self.attentions)  # type: ignore[operator]
        return Lines(caches, self.owner(batch))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Any = None,
        state: Lines | None = None,
    ) -> Any:
        self.check(x)
        self.refuse(context=context, pattern=pattern)
        if state is not None:
            self.check_state(state, Lines, len(x))
            return self.go_on(x, grid, state), state
        maps = x.unflatten(1, check_grid(grid, x.shape[1], axes=len(self.attentions)))
        if self.combine == "sequence":
            for axis, attention in enumerate(self.attentions):
                maps = along(attention, maps, axis)
            return maps.flatten(1, -2)
        first, *others = (along(attention, maps, axis) for axis, attention in enumerate(self.attentions))
        return sum(others, start=first).flatten(1, -2)

    def go_on(self, x: Tensor, grid: tuple[int, ...] | None, state: Lines) -> Tensor:
        """The next tokens of the grid. A line's earlier tokens are found among all so far by a pattern."""
        grid = check_grid(grid, x.shape[1], len(self.attentions), begin=state.caches[0].length)
        total: Any = 0
        for axis, (attention, cache) in enumerate(zip(self.attentions, state.caches, strict=True)):
            cache.keep(grid)
            y, _ = attention(x, pattern=SoFar(Axial(grid, axis)), state=cache)
            if self.combine == "sequence":
                x = y
            total = total + y
        return x if self.combine == "sequence" else total
