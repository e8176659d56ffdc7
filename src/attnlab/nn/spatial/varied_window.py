"""Varied-size window attention (VSA): each head moves and stretches the window that its block of queries looks at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import ANY_GRID, FEATURES, Card, register
from attnlab.nn.fused import linear
from attnlab.nn.mechanism import check_heads
from attnlab.positions.bias import Displacement, TableBias


@register(
    Card(
        name="varied_window",
        title="VSA: Learning Varied-Size Window Attention in Vision Transformers",
        paper="2204.08446",
        system="vsa",
        family="spatial",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N m²",
        growth=1.0,
        sample={"heads": 4, "window": 4},
    )
)
class VariedWindowAttention(nn.Module):
    """Window attention whose keys come from a window that each head predicts from what the queries' window holds.

        (o, s) = Wr LeakyReLU(mean over the m×m window of x)         two numbers each, per head and window
        keys and values at   centre + (1 + s) · (place in the window − centre) + o      bilinear, zero outside
        y = Wo softmax(q·k · scale + bias[displacement]) v

    `(B, C, H, W)` → `(B, out_dim, H, W)`, any size: the map is padded below and to the right with zeros that stay in
    the softmax, as do the zeros that a window finds outside of the map. An offset of 2 moves a window by about its own
    size; a scale of −1 shrinks it to its centre. The bias (Swin's table) belongs to the unmoved places. With Wr = 0, as
    built, this is plain window attention. Windows grow, shrink and overlap, so no shift is needed to join them.
    Cost: 4NC² + 2Nm²C, and four reads per sampled place. Source: arXiv 2204.08446 (ViTAE-Transformer/ViTAE-VSA).

    Args:
        window: m, on both axes. out_dim: width of queries, keys, values and output (`dim` if None).
        scale: of the scores; None for (dim / heads)^-½, in which the authors count the input's width, not `out_dim`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 7,
        out_dim: int | None = None,
        bias: bool = True,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.dim, self.heads, self.window, self.dropout = dim, heads, window, dropout
        self.out_dim = dim if out_dim is None else out_dim
        check_heads(self.out_dim, heads)
        self.scale = (dim // heads) ** -0.5 if scale is None else scale
        self.wqkv = nn.Linear(dim, 3 * self.out_dim, bias=bias)
        self.regress = nn.Linear(dim, 4 * heads)  # rows: offsets (head, x before y) | scales
        self.wo = nn.Linear(self.out_dim, self.out_dim)
        self.relative = TableBias((window, window), heads)
        self.reset_windows()

    def reset_windows(self) -> None:
        """Windows as they stand on the grid, unmoved and of size m."""
        nn.init.zeros_(self.regress.weight)
        nn.init.zeros_(self.regress.bias)

    def windows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What each head predicts on a map `(B, H, W, C)`: offsets and scales, `(B, heads, 2, nh, nw)`, x before y.

        Offsets are in units of half the padded map's extent.
        """
        height, width = x.shape[1:3]
        below, right = -height % self.window, -width % self.window
        pooled = F.avg_pool2d(F.pad(x.permute(0, 3, 1, 2), (0, right, 0, below)), self.window)
        found = self.regress(F.leaky_relu(pooled).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        offsets, scales = found.unflatten(1, (2, self.heads, 2)).unbind(1)
        counts = [max(1, n // self.window) for n in (width, height)]  # of the map before padding, as released
        return offsets / offsets.new_tensor(counts)[:, None, None], scales

    def places(self, offsets: Tensor, scales: Tensor) -> Tensor:
        """Where keys are read, `(B, heads, nh·nw, m², 2)`: x before y, −1 to 1 between the centres of the corners."""
        m, (down, across) = self.window, offsets.shape[-2:]
        inside = torch.arange(m, device=offsets.device, dtype=offsets.dtype) - (m - 1) / 2
        found = []
        for axis, count in enumerate((across, down)):
            unit = 2 / max(count * m - 1, 1)
            centres = (torch.arange(count, device=offsets.device, dtype=offsets.dtype) * m + (m - 1) / 2) * unit - 1
            centres = centres if axis == 0 else centres[:, None]
            at = (centres + offsets[:, :, axis])[..., None] + (1 + scales[:, :, axis])[..., None] * inside * unit
            at = at.flatten(2, 3)  # (B, heads, windows, m)
            found.append(at[..., None, :].expand(*at.shape, m) if axis == 0 else at[..., None].expand(*at.shape, m))
        return torch.stack(found, -1).flatten(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        m, heads, (batch, _, height, width) = self.window, self.heads, x.shape
        x = x.permute(0, 2, 3, 1)
        # Places want more than half precision.
        wide = torch.promote_types(x.dtype, torch.float32)
        places = self.places(*(t.to(wide) for t in self.windows(x))).flatten(0, 1)
        below, right = -height % m, -width % m
        down, across = (height + below) // m, (width + right) // m
        qkv = linear(x, self.wqkv)
        if below or right:
            qkv = F.pad(qkv, (0, 0, 0, right, 0, below))  # after the projection: its bias does not leak
        q, kv = qkv.split((self.out_dim, 2 * self.out_dim), -1)
        q = q.reshape(batch, down, m, across, m, heads, -1).permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(0, 2)
        kv = kv.unflatten(-1, (2, heads, -1)).permute(0, 4, 3, 5, 1, 2).flatten(2, 3).flatten(0, 1)
        read = F.grid_sample(kv.to(wide), places, padding_mode="zeros", align_corners=True).to(x.dtype)
        read = read.unflatten(1, (2, -1)).unflatten(0, (batch, heads))  # (B, heads, 2, D, windows, m²)
        k, v = read.permute(2, 0, 4, 1, 5, 3).flatten(1, 2).contiguous().unbind()
        at = torch.arange(m * m, device=x.device)
        bias = self.relative.table[Displacement(self.relative.window)(at[:, None], at)].permute(2, 0, 1)
        out = attend(q, k, v, bias=bias, scale=self.scale, dropout=self.dropout if self.training else 0.0)
        out = out.reshape(batch, down, across, heads, m, m, -1).permute(0, 1, 4, 2, 5, 3, 6)
        out = out.reshape(batch, down * m, across * m, self.out_dim)[:, :height, :width]
        return linear(out, self.wo).permute(0, 3, 1, 2)
