"""Global-query attention (GC ViT): all windows of an image are asked the same questions, which the whole image made."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.channel.squeeze_excite import SqueezeExcite
from attnlab.nn.mechanism import check_grid, split_heads
from attnlab.nn.spatial.groups import GroupAttention


class FusedResidual(nn.Module):
    """x + conv1×1(squeeze-excite(GELU(dwconv3×3(x)))), without biases, on `(B, C, H, W)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.act = nn.GELU()
        self.se = SqueezeExcite(dim, bias=False, activation=nn.GELU)
        self.conv2 = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.se(self.act(self.conv1(x))))


class QueryGenerator(nn.Module):
    """Maps `(B, C, H, W)` to one query per place of a window, `(B, heads, w², C/heads)`, by convolution and pooling.

    Each of `levels` halves the map by a 3×3 maximum; what is then not w×w (at sizes the authors have not) is pooled so.
    """

    def __init__(self, dim: int, *, heads: int, window: int, levels: int = 0) -> None:
        super().__init__()
        if levels < 0:
            raise ValueError(f"levels must be at least 0, got {levels}")
        self.heads, self.window, self.levels = heads, window, levels
        self.blocks = nn.ModuleList(FusedResidual(dim) for _ in range(max(levels, 1)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if self.levels:
                x = F.max_pool2d(x, 3, 2, 1)
        if x.shape[2:] != (self.window, self.window):
            x = F.adaptive_max_pool2d(x, self.window)
        return split_heads(x.permute(0, 2, 3, 1).flatten(1, 2), self.heads)


@register(
    Card(
        name="global_query",
        title="Global Context Vision Transformers",
        paper="2206.09959",
        system="gcvit",
        family="spatial",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_GRID,
        cost="N w²",
        growth=1.0,
        sample={"heads": 4, "window": 4},
    )
)
class GlobalQueryAttention(GroupAttention):
    """Window attention whose queries come from the whole map: one set for all windows, so that each hears of the rest.

        y_i = Wo Σ_j softmax_j(g_p·k_j / √D + table[p − place(j)]) v_j        p the place of i in its window, j in it

    x (B, H·W, C) with grid=(H, W) → the same shape, any grid; windows that the map does not fill see what there is of
    it. The global queries g (B, heads, w², D) come from a convolutional generator; several layers may share one:
    `levels=None` builds none, and each call is given `queries`. They are not projected. Cost: 3NC² + 2Nw²C, and the
    generator's. Source: arXiv 2206.09959 (NVlabs/GCVit).
    """

    def __init__(self, dim: int, *, heads: int = 8, window: int = 7, levels: int | None = 0, **group: Any) -> None:
        super().__init__(dim, heads=heads, window=window, **group)
        self.wkv = nn.Linear(dim, 2 * dim, bias=self.wqkv.bias is not None)
        del self.wqkv
        self.generator = None if levels is None else QueryGenerator(dim, heads=heads, window=window, levels=levels)

    def qkv(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        raise ValueError(
            "GlobalQueryAttention has no queries of its own tokens: its queries are those of the whole map"
        )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Any = None,
        state: Any = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        self.check(x)
        self.refuse(context=context, pattern=pattern, state=state)
        height, width = check_grid(grid, x.shape[1], axes=2)
        maps = x.unflatten(1, (height, width))
        if queries is None:
            if self.generator is None:
                raise ValueError("queries must be given where the layer has no generator of its own (levels=None)")
            queries = self.generator(maps.permute(0, 3, 1, 2))
        wanted = (len(x), self.heads, self.window**2, self.head_dim)
        if queries.shape != wanted:
            raise ValueError(f"queries must have shape {wanted}, got {tuple(queries.shape)}")
        groups = self.groups((height, width))
        k, v = (split_heads(t, self.heads) for t in self.wkv(groups.cut(maps)).chunk(2, dim=-1))
        return self.within(groups, queries.repeat_interleave(groups.count, 0), k, v)
