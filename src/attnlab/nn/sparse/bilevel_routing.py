"""Bi-level routing attention (BiFormer): regions choose regions, then tokens see the tokens of the chosen ones."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import ANY_GRID, EXACT, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.fused import linear
from attnlab.nn.mechanism import Mechanism, check_grid, check_heads
from attnlab.patterns import Pattern
from attnlab.routing import Partition, Routed


class Choice(NamedTuple):
    """Which regions each region chose, `(B, regions², topk)`, best first, and the softmax of their scores."""

    regions: Tensor
    weights: Tensor


@register(
    Card(
        name="bilevel_routing",
        title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
        paper="2303.08810",
        system="biformer",
        family="sparse",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_GRID | EXACT,
        cost="N² topk / regions² (N^4/3 with the best number of regions)",
        sample={"heads": 4, "regions": 4, "topk": 3},
        limit=lambda dim, grid: BilevelRouting(dim, heads=4, regions=2, topk=4, scale=(dim // 4) ** -0.5, local=0),
        growth=2.0,
    )
)
class BilevelRouting(Mechanism):
    """Attention to the tokens of the `topk` regions that suit the query's region, plus a depth-wise convolution of v.

        r_ab = s · mean(q in a) · mean(k in b)        a, b of regions × regions;  R(a) = topk_b r_ab
        y_i  = Wo ( Σ_j softmax_j(s · q_i·k_j) v_j  +  dwconv(v)_i )        j in the regions R(region of i)

    x `(B, H·W, C)` with grid=(H, W) → the same shape; s = D^-½ with D the width of all heads together, as the authors
    have it. All heads share R. Cost per head 2 N² (topk/regions²) (D + Dv)/heads, and (regions²)² D for the routing;
    `topk = regions²` is full attention. Source: arXiv 2303.08810 (rayleizhu/BiFormer, `bra_legacy`).

    A grid that the regions do not divide is padded with zeros below and to the right. As in the authors' code (their
    `auto_pad`) what the projection makes of these zeros counts as keys and in the means: pad and crop yourself to
    differ.

    Args:
        heads: of both q·k and v.
        regions: per side of the map (the authors' n_win), so regions² in all.
        topk: regions that each region sees, at most regions².
        qk_dim: D; C if None.
        local: kernel of the depth-wise convolution of v (LePE), 0 for none.
        pool: "avg" or "max" shrinks the keys and values of a region, each region to `pool_to`² of them or, if that is
            None, by `pool_ratio` per side. Routing always uses the unpooled means.
        soft_routing: keys and values are multiplied by the softmax of their region's score.
        diff_routing: the scores are differentiable. With `soft_routing` their gradient comes through the weights;
            without (planned by the authors, never released), straight through: weights of 1 with the soft gradient.
        param_routing: one more linear map of q and k before the routing; needs `diff_routing`.
        auto_pad: False refuses a grid that the regions do not divide.
        output: False leaves out Wo.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        regions: int = 7,
        topk: int = 4,
        qk_dim: int | None = None,
        scale: float | None = None,
        local: int = 5,
        pool: Literal["avg", "max"] | None = None,
        pool_to: int | None = None,
        pool_ratio: int = 4,
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        auto_pad: bool = True,
        output: bool = True,
    ) -> None:
        super().__init__(dim)
        if causal:
            raise ValueError("causal=True: regions of a map have no order; only causal=False exists")
        self.qk_dim = dim if qk_dim is None else qk_dim
        check_heads(dim, heads)
        check_heads(self.qk_dim, heads)
        if regions < 1 or not 1 <= topk <= regions**2:
            raise ValueError(f"topk must lie between 1 and regions² = {regions**2}, got {topk}")
        if pool not in (None, "avg", "max"):
            raise ValueError(f"pool must be None, 'avg' or 'max', got {pool!r}")
        if param_routing and not diff_routing:
            raise ValueError("param_routing=True needs diff_routing=True: its weights would get no gradient")
        if local < 0 or (local and local % 2 == 0):
            raise ValueError(f"local must be 0 or an odd kernel size, got {local}")
        self.heads, self.regions, self.topk = heads, regions, topk
        self.scale = self.qk_dim**-0.5 if scale is None else scale
        self.pool, self.pool_to, self.pool_ratio = pool, pool_to, pool_ratio
        self.soft_routing, self.diff_routing, self.auto_pad = soft_routing, diff_routing, auto_pad
        self.wqkv = nn.Linear(dim, 2 * self.qk_dim + dim)
        self.wo = nn.Linear(dim, dim) if output else nn.Identity()
        self.router = nn.Linear(self.qk_dim, self.qk_dim) if param_routing else nn.Identity()
        self.lepe = DepthwiseConv(dim, local) if local else None

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
        return self.details(x, grid, weights=False)[0]

    def details(
        self, x: Tensor, grid: tuple[int, ...] | None, *, weights: bool = True
    ) -> tuple[Tensor, Choice, Tensor | None]:
        """The output, the routing, and (if `weights`) the attention `(B·regions², heads, queries, topk·keys)`."""
        self.check(x)
        height, width = check_grid(grid, x.shape[1], axes=2)
        n = self.regions
        down, across = -height % n, -width % n
        if (down or across) and not self.auto_pad:
            raise ValueError(f"grid must be a multiple of regions={n} on both sides (or auto_pad=True), got {grid}")
        maps = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, across, 0, down))
        tall, wide = (height + down) // n, (width + across) // n

        # One region after the other, and within a region its tokens by row: (B, regions², tokens, C).
        tokens = maps.unflatten(1, (n, tall)).unflatten(3, (n, wide)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        q, k, v = linear(tokens, self.wqkv).split([self.qk_dim, self.qk_dim, self.dim], -1)
        choice = self.route(q.mean(2), k.mean(2))
        lepe = None if self.lepe is None else self.lepe(_to_map(v, n, tall))
        k, v = self._pool(k, tall), self._pool(v, tall)

        attention = None
        if weights or self.soft_routing or self.diff_routing:
            y, attention = self._gathered(q, k, v, choice)
        else:
            queries, keys = (Partition.of(t.shape[2], t.shape[1] * t.shape[2]) for t in (q, k))
            q, k, v = (t.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
            y = attend(q, k, v, route=Routed.of(choice.regions[:, None], queries, keys), scale=self.scale)
            y = y.transpose(1, 2).flatten(2).unflatten(1, (n * n, -1))
        y = _to_map(y, n, tall)
        y = y if lepe is None else y + lepe
        y = linear(y[..., :height, :width].flatten(2).transpose(1, 2), self.wo)
        return y, choice, attention

    def route(self, q: Tensor, k: Tensor) -> Choice:
        """The choice of each region, from the mean queries and keys `(B, regions², D)`."""
        if not self.diff_routing:
            q, k = q.detach(), k.detach()
        scores = self.scale * self.router(q) @ self.router(k).transpose(-1, -2)
        best, index = scores.topk(self.topk, dim=-1)
        return Choice(index, best.softmax(-1))

    def _pool(self, x: Tensor, tall: int) -> Tensor:
        """Keys or values of each region `(B, regions², tokens, C)`, fewer of them if they are pooled."""
        if self.pool is None or (self.pool_to is None and self.pool_ratio <= 1):
            return x
        maps = x.unflatten(2, (tall, -1)).flatten(0, 1).movedim(-1, 1)
        if self.pool_to is not None:
            adaptive = F.adaptive_avg_pool2d if self.pool == "avg" else F.adaptive_max_pool2d
            maps = adaptive(maps, self.pool_to)
        else:
            maps = (F.avg_pool2d if self.pool == "avg" else F.max_pool2d)(maps, self.pool_ratio)
        return maps.flatten(2).transpose(1, 2).unflatten(0, x.shape[:2])

    def _gathered(self, q: Tensor, k: Tensor, v: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
        """The same attention with the chosen keys copied per region (memory × topk): they can be weighted then."""
        batch = torch.arange(len(q), device=q.device)[:, None, None]
        k, v = k[batch, choice.regions], v[batch, choice.regions]  # (B, regions², topk, keys, D)
        if self.soft_routing or self.diff_routing:
            share = choice.weights
            if not self.soft_routing:
                share = 1 + share - share.detach()
            k, v = k * share[..., None, None], v * share[..., None, None]
        q, k, v = (t.flatten(0, 1).flatten(1, -2).unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        attention = (self.scale * q @ k.transpose(-1, -2)).softmax(-1)
        return (attention @ v).transpose(1, 2).flatten(2).unflatten(0, (len(batch), -1)), attention


def _to_map(x: Tensor, regions: int, tall: int) -> Tensor:
    """`(B, regions², tokens, C)`, the tokens of a region in `tall` rows, as a map `(B, C, H, W)`."""
    x = x.unflatten(2, (tall, -1)).unflatten(1, (regions, regions))  # (B, n, n, h, w, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
