"""Halo attention (HaloNet): blocks of queries look at their own block and a halo around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import FEATURES, Card, register
from attnlab.nn.mechanism import check_heads
from attnlab.nn.spatial.outlook import Unfold


@register(
    Card(
        name="halo",
        title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        paper="2103.12731",
        system="halonet",
        family="spatial",
        kind=FEATURES,
        cost="N (b + 2h)²",
        growth=1.0,
        sample={"heads": 4, "block": 2, "halo": 1},
    )
)
class HaloAttention(nn.Module):
    """Local attention that computers like: all queries of a b×b block share one (b + 2h)×(b + 2h) window of keys.

        logits = (Wq x · Wk x) / √d + Wq x · (rows[r − y + w − 1] + columns[c − x + w − 1])        w = b + 2h
        y = softmax(logits) Wv x

    for a query at place (y, x) of its block and a key at (r, c) of the window. `(B, C, H, W)` → `(B, out_dim, H/stride,
    W/stride)`; H and W must be multiples of b. Beyond the map, keys are zero but stay in the softmax, as in timm, whose
    layer is the public code that is followed here; `masked=True` takes them out of it. No projection follows: in a
    HaloNet that is the next 1×1 convolution. Shifting the map by b shifts the output by b, apart from the border.
    Cost: N·w²·(2d + 2w) per head; memory of keys and values grows by (1 + 2h/b)². Source: arXiv 2103.12731.

    The relative logits are a product of the query with two tables, one entry per row and one per column of the window;
    so they are put beside the query, and the key gets the one-hot row and column that pick them. The attention is then
    plain softmax attention with w·2 more features, and no table of logits is ever written out.

    Args:
        head_dim: d of queries and keys (out_dim / heads if None); values have out_dim / heads.
        stride: 2 halves the map: every second query of an even block; with an odd block, or `average=True`, the mean of
            2×2 outputs. The strided query's place is counted in the halved block, as in timm.
        scale_positions: divides the relative logits by √d too.
    """

    onehot: Tensor

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        block: int = 8,
        halo: int = 3,
        out_dim: int | None = None,
        head_dim: int | None = None,
        stride: int = 1,
        bias: bool = False,
        average: bool = False,
        scale_positions: bool = False,
        masked: bool = False,
    ) -> None:
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        self.value_dim = check_heads(out_dim, heads)[1]
        if block < 1 or halo < 0:
            raise ValueError(f"block must be at least 1 and halo at least 0, got {block} and {halo}")
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        self.dim, self.heads, self.block, self.halo = dim, heads, block, halo
        self.head_dim = head_dim or self.value_dim
        self.scale_positions, self.masked = scale_positions, masked
        self.pooled = stride == 2 and (average or block % 2 == 1)
        self.step = stride if stride == 2 and not self.pooled else 1
        self.wq = nn.Linear(dim, heads * self.head_dim, bias=bias)
        self.wkv = nn.Linear(dim, heads * (self.head_dim + self.value_dim), bias=bias)  # per head: key | value
        for layer in (self.wq, self.wkv):
            nn.init.trunc_normal_(layer.weight, std=dim**-0.5)
        window = block + 2 * halo
        self.rows, self.columns = (
            nn.Parameter(torch.randn(2 * window - 1, self.head_dim) * self.head_dim**-0.5) for _ in range(2)
        )
        with torch.device("cpu"):
            each = torch.eye(window)
            onehot = torch.cat((each.repeat_interleave(window, 0), each.repeat(window, 1)), 1)
        self.register_buffer("onehot", onehot, persistent=False)  # key (r, c): its row | its column

    def queries(self, x: Tensor) -> Tensor:
        """Per block: the scaled query | its logits for each row | for each column: `(B, nh, nw, heads, q, q, …)`."""
        side, window, scale = self.block // self.step, self.block + 2 * self.halo, self.head_dim**-0.5
        q = self.wq(x[:, :: self.step, :: self.step]) * scale
        down, across = q.shape[1] // side, q.shape[2] // side
        q = q.reshape(len(x), down, side, across, side, self.heads, self.head_dim).permute(0, 1, 3, 5, 2, 4, 6)
        # Entry r − y + window − 1 of the table for row r and query y.
        at = torch.arange(window, device=x.device) - torch.arange(side, device=x.device)[:, None] + window - 1
        tables = self.rows[at].mT, self.columns[at].mT  # (side, D, window)
        if not self.scale_positions:
            tables = tables[0] / scale, tables[1] / scale
        return torch.cat((q, q @ tables[0], (q.transpose(-2, -3) @ tables[1]).transpose(-2, -3)), -1)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        if x.shape[2] % self.block or x.shape[3] % self.block:
            raise ValueError(f"x's height and width must be multiples of block={self.block}, got {tuple(x.shape[2:])}")
        x = x.permute(0, 2, 3, 1)
        window = self.block + 2 * self.halo
        q = self.queries(x)
        batch, down, across, _, side = q.shape[:5]
        kv = Unfold.apply(self.wkv(x), self.heads, window, self.block, self.halo).flatten(0, 2)
        k, v = kv.split((self.head_dim, self.value_dim), -1)
        places = self.onehot.to(k).expand(*k.shape[:2], -1, -1)
        q, k = q.flatten(4, 5).flatten(0, 2), torch.cat((k, places), -1)
        if self.masked and self.halo:
            q, k = F.pad(q, (0, 1), value=1.0), torch.cat((k, self.beyond(x, batch)), -1)
        # Queries, keys and values of one width are what the fused kernels take; what fills the values is cut off again.
        wide = max(k.shape[-1], self.value_dim)
        q, k = (F.pad(t, (0, wide - t.shape[-1])) if t.shape[-1] < wide else t for t in (q, k))
        if 0 < wide - self.value_dim <= places.shape[-1]:
            v = torch.cat((v, places[..., : wide - self.value_dim]), -1)
        elif wide > self.value_dim:
            v = F.pad(v, (0, wide - self.value_dim))
        out = attend(q, k, v, scale=1.0)[..., : self.value_dim]
        out = out.reshape(batch, down, across, self.heads, side, side, -1).permute(0, 1, 4, 2, 5, 3, 6)
        out = out.reshape(batch, down * side, across * side, -1).permute(0, 3, 1, 2)
        return F.avg_pool2d(out, 2) if self.pooled else out

    def beyond(self, x: Tensor, batch: int) -> Tensor:
        """What is added to the logit of each key: next to −∞ beyond the map, `(B·blocks, heads, w², 1)`."""
        outside = F.pad(x.new_zeros(x.shape[1:3]), (self.halo,) * 4, value=0.5 * torch.finfo(x.dtype).min)
        window = self.block + 2 * self.halo
        windows = outside.unfold(0, window, self.block).unfold(1, window, self.block).reshape(-1, 1, window**2, 1)
        return windows.repeat(batch, self.heads, 1, 1)
