"""Self-guided attention: one layer finds out where attention goes, the next merges the tokens that little reaches.

HybridAttention      half of the heads see a coarse map, half their window; both say which tokens are looked at
GuidedAttention      all tokens ask; those looked at least answer in large groups, those looked at most in small ones
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.nn.mechanism import Mechanism, check_grid, check_heads, join_heads, split_heads
from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.groups import Groups

# How many tokens become one, from the least to the most significant, by the reduction of the layer before. Three
# sizes are for the quarter, half and quarter of the tokens, two for halves.
GROUPS: dict[int, tuple[int, ...]] = {8: (196, 56, 28), 4: (49, 14, 7), 2: (2, 1)}


class LocalEnhancement(nn.Module):
    """dwconv3×3(W x), which attention's heads are added to: (B, H·W, C) with grid=(H, W) → the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        maps = self.linear(x).unflatten(1, grid).permute(0, 3, 1, 2)
        return self.conv(maps).permute(0, 2, 3, 1).flatten(1, 2)


class EnhancedAttention(MultiHead):
    """Softmax attention from all to all with a local convolution beside it: y = Wo (heads + dwconv3×3(W x)).

    x (B, H·W, C) with grid=(H, W) → the same. Cost O(N²).
    """

    def __init__(self, dim: int, *, heads: int = 8, bias: bool = True) -> None:
        super().__init__(dim, heads=heads, bias=bias, out_bias=True)
        self.local = LocalEnhancement(dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, grid: tuple[int, ...] | None = None, **given: Any
    ) -> Tensor:
        """`context` (B, M, C), if given, are the tokens that answer."""
        self.refuse(**given)
        self.check(x, context)
        height, width = check_grid(grid, x.shape[1], 2)
        q, k, v = self.qkv(x, context)
        return self.wo(join_heads(attend(q, k, v)) + self.local(x, (height, width)))


class GuidedAttention(EnhancedAttention):
    """Attention to a short sequence in which significant tokens stand nearly alone and the others in crowds.

        order = sort(significance), ascending, cut in parts: ¼, ½, ¼ for three group sizes, ½, ½ for two
        s = concat over parts of f_part · (each group of consecutive tokens) + b_part       one weight per member
        y = Wo (attend(Wq x, Wk s, Wv s) + dwconv3×3(W x))

    x (B, H·W, C), significance (B, H, W) → as x. The significance carries no gradient. Cost O(N·M) for M merged tokens.
    Source: arXiv 2308.12216 (OliverRensu/SG-Former). There, half of the heads see tokens in the order of a sort of the
    transposed map; the values that are sorted are the same, so the order is too, but for ties, and one sort is enough.

    Args:
        groups: how many tokens become one, per part.
    """

    def __init__(self, dim: int, *, heads: int = 8, groups: Sequence[int] = (49, 14, 7), bias: bool = True) -> None:
        if len(groups) not in (2, 3) or min(groups) < 1:
            raise ValueError(f"groups must be two or three sizes of at least 1, got {tuple(groups)}")
        super().__init__(dim, heads=heads, bias=bias)
        self.groups = tuple(groups)
        self.shares = (2, 2) if len(groups) == 2 else (4, 2, 4)
        self.merging = nn.ModuleList(nn.Linear(size, 1) for size in groups)

    def merge_tokens(self, x: Tensor, significance: Tensor) -> Tensor:
        """The M tokens that answer: (B, N, C), (B, H, W) → (B, M, C)."""
        n = x.shape[1]
        for size, share in zip(self.groups, self.shares, strict=True):
            if n % (size * share):
                raise ValueError(
                    f"x must hold a multiple of {size * share} tokens for a group of {size} in groups={self.groups}, "
                    f"got {n}"
                )
        order = significance.detach().flatten(1).sort(dim=1, stable=True).indices
        ordered = x.gather(1, order.unsqueeze(-1).expand_as(x))
        merged = []
        for part, module in zip(ordered.split([n // share for share in self.shares], 1), self.merging, strict=True):
            merge = cast(nn.Linear, module)
            merged.append((merge.weight @ part.unflatten(1, (-1, merge.in_features))).squeeze(2) + merge.bias)
        return torch.cat(merged, 1)

    def forward(  # type: ignore[override]
        self, x: Tensor, significance: Tensor, *, grid: tuple[int, ...] | None = None
    ) -> Tensor:
        size = check_grid(grid, x.shape[1], 2)
        if significance.shape != (len(x), *size):
            raise ValueError(f"significance must be (B, H, W) = {(len(x), *size)}, got {tuple(significance.shape)}")
        return super().forward(x, self.merge_tokens(x, significance), grid=size)


class HybridAttention(Mechanism):
    """Half of the heads attend to a coarse map, half inside windows; together they tell which tokens are looked at.

        coarse = gelu(norm(conv_{r×r, stride r}(x)))
        far = attend(q, Wk coarse, Wv coarse)                   near = attend(q', k', v') inside each window
        y = Wo (concat(far, near) + dwconv3×3(W x))
        significance = mean over heads and queries of far's weights, up-sampled, + the same of near's

    x (B, H·W, C) with grid=(H, W), whose sides `window` and `reduction` divide → the same. `scales` gives both y and
    the significance, (B, H, W), which carries no gradient. Cost O(N²/r² + N w²). Source: arXiv 2308.12216.

    Args:
        reduction: r. window: w.
    """

    def __init__(self, dim: int, *, heads: int = 8, reduction: int = 8, window: int = 7, bias: bool = True) -> None:
        super().__init__(dim)
        check_heads(dim, heads)
        if heads % 2:
            raise ValueError(f"heads must be even, half of them for each scale, got {heads}")
        if reduction < 2 or window < 1:
            raise ValueError(f"reduction must be at least 2 and window at least 1, got {reduction} and {window}")
        self.heads, self.reduction, self.window = heads, reduction, window
        self.reduce = nn.Conv2d(dim, dim, reduction, reduction)
        self.norm = nn.LayerNorm(dim)
        self.wx = nn.Linear(dim, 2 * dim, bias=bias)  # rows: far queries, then near queries, keys and values
        self.wcoarse = nn.Linear(dim, dim, bias=bias)  # rows: far keys and values
        self.wo = nn.Linear(dim, dim)
        self.local = LocalEnhancement(dim)

    def scales(self, x: Tensor, *, grid: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
        """y (B, N, C) and the significance (B, H, W)."""
        self.check(x)
        height, width = check_grid(grid, x.shape[1], 2)
        step = math.lcm(self.window, self.reduction)
        if height % step or width % step:
            raise ValueError(f"grid must have sides that are multiples of {step}, got {(height, width)}")
        half, heads, r = self.dim // 2, self.heads // 2, self.reduction
        maps = x.unflatten(1, (height, width))
        far_q, near = self.wx(x).split([half, 3 * half], -1)
        coarse = self.reduce(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        k, v = (split_heads(t, heads) for t in self.wcoarse(F.gelu(self.norm(coarse))).chunk(2, -1))
        far, seen = _weighted(split_heads(far_q, heads), k, v)
        coarse_map = seen.unflatten(1, (height // r, width // r))
        windows = Groups((height, width), (self.window, self.window))
        q, k, v = (split_heads(t, heads) for t in windows.cut(near.unflatten(1, (height, width))).chunk(3, -1))
        near, near_seen = _weighted(q, k, v)
        both = torch.cat((join_heads(far), windows.join(join_heads(near)).flatten(1, 2)), -1)
        up = coarse_map.repeat_interleave(r, 1).repeat_interleave(r, 2)
        significance = windows.join(near_seen.unsqueeze(-1)).squeeze(-1) + up
        return self.wo(both + self.local(x, (height, width))), significance

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, grid: tuple[int, ...] | None = None, **given: Any
    ) -> Tensor:
        self.refuse(context=context, **given)
        return self.scales(x, grid=grid)[0]


def _weighted(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention, few keys each, and how much each key is looked at, over heads and queries: (B, H, N, D), (B, M)."""
    weights = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
    return weights @ v, weights.detach().mean((1, 2))
