"""Attention as a convolution (MSA-Conv): every place attends to the window that a convolution would read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import ANY_GRID, FEATURES, Card, register
from attnlab.nn.mechanism import check_heads
from attnlab.patterns import Around

SHIFTS, POOLS = ("none", "qkv", "kv"), ("none", "kv_avg", "kv_max", "tokens")
# In which direction (rows, columns) each of four groups of heads is rolled.
DIRECTIONS = ((-1, 0), (1, 0), (0, -1), (0, 1))


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """`value` for rows and columns."""
    found = (value, value) if isinstance(value, int) else tuple(value)
    if len(found) != 2 or min(found) < 1:
        raise ValueError(f"{name} must be a positive integer or two, got {value!r}")
    return found


def conv_attend(
    q: Tensor, k: Tensor, v: Tensor, *, kernel: tuple[int, int], dilation: tuple[int, int], scale: float, dropout: float
) -> Tensor:
    """`(B, H, *grid, D)` attend to their windows of k and v `(B, Hkv, *grid, D)`; the zeros around the map count.

        y_i = Σ_j exp(s_ij) v_j / (Σ_j exp(s_ij) + z_i)        j in the window and on the map, z_i places are off it

    A key beyond the map is zero: its score is 0 and its value nothing. So it need not be made: it adds 1 to the
    denominator, which the log-sum-exp of the rest tells.
    """
    grid = (k.shape[2], k.shape[3])
    tokens = [t.flatten(2, 3) for t in (q, k, v)]
    out, lse = attend(*tokens, pattern=Around(grid, kernel, dilation), scale=scale, dropout=dropout, return_lse=True)
    seen = torch.ones((), device=q.device, dtype=lse.dtype)
    for length, size, step in zip(grid, kernel, dilation, strict=True):
        place = torch.arange(length, device=q.device)
        before, after = place // step, (length - 1 - place) // step
        count = 1 + before.clamp_max(size // 2) + after.clamp_max(size // 2)
        seen = seen[..., None] * count.to(lse)
    beyond = kernel[0] * kernel[1] - seen.flatten()
    share = (lse - beyond.log()).sigmoid()[..., None].to(out)
    return (out * share).unflatten(2, grid)


@register(
    Card(
        name="msa_conv",
        title="TiC: Exploring Vision Transformer in Convolution",
        paper="2310.04134",
        system="tic",
        family="spatial",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N k²",
        growth=1.0,
        sample={"heads": 4, "kernel": 3},
    )
)
class ConvolutionalAttention(nn.Module):
    """Multi-head attention inside a k×k window, zero padding included: a convolution whose weights are looked up.

        y = Wo [per head: softmax over the window of (q · k / √d) v]

    `(B, C, H, W)` to the same, any size. Zero keys beyond the map stay in the softmax with score 0, so a constant map
    comes out smaller at its border. Variants: `heads=1` (standard), `dilation > 1`, `heads=C` (depth-wise).
    Cost: 4NC² + 2Nk²C. Source: arXiv 2310.04134 (zs670980918/MSA-Conv has the operator; how heads, shift and pooling go
    together is not published, so what follows is a reading of the paper).

    Args:
        shift: rolls a quarter of the heads each up, down, left and right by ⌊k/2⌋, cyclically (with fewer than four
            heads, head i in direction i), and the result back: "qkv" rolls all, so that rows at one border see the
            opposite one and the rest of the map sees the same; "kv" moves every window in its head's direction.
        inter_pool: keys and values of a map pooled by `pool`, so that a window covers pool·k: "kv_avg", "kv_max";
            a query looks at the window around its pooled place. "tokens" pools the queries too, and repeats the result.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        kernel: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        shift: str = "none",
        inter_pool: str = "none",
        pool: int = 2,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.head_dim = dim, heads, check_heads(dim, heads)[1]
        self.kernel, self.dilation = pair("kernel", kernel), pair("dilation", dilation)
        if not (self.kernel[0] % 2 and self.kernel[1] % 2):
            raise ValueError(f"kernel must be odd on both axes, got {self.kernel}")
        if shift not in SHIFTS:
            raise ValueError(f"shift must be one of {SHIFTS}, got {shift!r}")
        if inter_pool not in POOLS:
            raise ValueError(f"inter_pool must be one of {POOLS}, got {inter_pool!r}")
        if pool < 1:
            raise ValueError(f"pool must be at least 1, got {pool}")
        self.shift, self.inter_pool, self.pool, self.dropout = shift, inter_pool, pool, dropout
        self.wqkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.wo = nn.Linear(dim, dim, bias=bias)

    def rolled(self, maps: Tensor, sign: int) -> Tensor:
        """Each group of heads of `(B, heads, H, W, …)` rolled in its direction, `sign` times ⌊k/2⌋."""
        parts, groups = [], min(self.heads, len(DIRECTIONS))
        for group, (down, across) in enumerate(DIRECTIONS[:groups]):
            heads = maps[:, -(-group * self.heads // groups) : -(-(group + 1) * self.heads // groups)]
            by = sign * down * (self.kernel[0] // 2), sign * across * (self.kernel[1] // 2)
            parts.append(heads.roll(by, (2, 3)))
        return torch.cat(parts, 1)

    def pooled(self, maps: Tensor, highest: bool = False) -> Tensor:
        """Means (or maxima) over pool×pool places of `(B, H, W, C)`; at the end over what there is."""
        x = maps.permute(0, 3, 1, 2)
        if highest:
            x = F.max_pool2d(x, self.pool, ceil_mode=True)
        else:
            x = F.avg_pool2d(x, self.pool, ceil_mode=True, count_include_pad=False)
        return x.permute(0, 2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        x = x.permute(0, 2, 3, 1)
        height, width = x.shape[1:3]
        if self.inter_pool == "tokens":
            y = self.mix(self.pooled(x))
            y = y.repeat_interleave(self.pool, 1).repeat_interleave(self.pool, 2)[:, :height, :width]
        else:
            y = self.mix(x)
        return self.wo(y).permute(0, 3, 1, 2)

    def mix(self, x: Tensor) -> Tensor:
        """Attention of all heads, joined but not projected: `(B, H, W, C)` to the same."""
        height, width = x.shape[1:3]
        qkv = self.wqkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 4, 1, 2, 5)  # (3, B, heads, H, W, D)
        if self.shift == "qkv":
            qkv = self.rolled(qkv.flatten(0, 1), 1).unflatten(0, (3, -1))
        q, kv = qkv[0], qkv[1:]
        if self.shift == "kv":
            kv = self.rolled(kv.flatten(0, 1), 1).unflatten(0, (2, -1))
        pool = self.pool if self.inter_pool in ("kv_avg", "kv_max") else 1
        if pool > 1:
            kv = self.pooled(kv.flatten(0, 2), self.inter_pool == "kv_max").unflatten(0, kv.shape[:3])
            # The pool² queries of one pooled place share its window: as query heads of one key head.
            q = F.pad(q, (0, 0, 0, -width % pool, 0, -height % pool))
            q = q.unflatten(3, (-1, pool)).unflatten(2, (-1, pool)).permute(0, 1, 3, 5, 2, 4, 6).flatten(1, 3)
        y = conv_attend(
            q, kv[0], kv[1], kernel=self.kernel, dilation=self.dilation, scale=self.head_dim**-0.5,
            dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        if pool > 1:
            y = y.unflatten(1, (self.heads, pool, pool)).permute(0, 1, 4, 2, 5, 3, 6).flatten(4, 5).flatten(2, 3)
            y = y[:, :, :height, :width]
        if self.shift == "qkv":
            y = self.rolled(y, -1)
        return y.permute(0, 2, 3, 1, 4).flatten(3)


@register(
    Card(
        name="msa_conv_layer",
        title="TiC: Exploring Vision Transformer in Convolution",
        paper="2310.04134",
        system="tic",
        family="spatial",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N k²",
        growth=1.0,
        sample={"kernel": 3},
    )
)
class MSAConv(nn.Module):
    """The layer as released: single-head attention in a window with a residual, then a convolution of the same kernel.

        y = ReLU(conv_{k×k}(x + softmax over the window of (q · k / √C) v))

    `(B, C, H, W)` to `(B, out_dim, H', W')`; the convolution takes `stride` and `padding` (k // 2 keeps the size).
    Source: arXiv 2310.04134 (zs670980918/MSA-Conv). `ConvolutionalAttention` is the mixer that the paper describes.
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel: int = 3,
        out_dim: int | None = None,
        dilation: int = 1,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.dim, self.dropout = dim, dropout
        self.kernel, self.dilation = pair("kernel", kernel), pair("dilation", dilation)
        if not (self.kernel[0] % 2 and self.kernel[1] % 2):
            raise ValueError(f"kernel must be odd, got {kernel}")
        self.wqkv = nn.Linear(dim, 3 * dim)
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(dim, out_dim or dim, kernel, stride, padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        q, k, v = self.wqkv(x.permute(0, 2, 3, 1))[:, None].chunk(3, -1)
        y = conv_attend(
            q, k, v, kernel=self.kernel, dilation=self.dilation, scale=self.dim**-0.5,
            dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return self.conv(x + y[:, 0].permute(0, 3, 1, 2)).relu()
