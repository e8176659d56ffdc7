"""Context mixing (ContMix, OverLoCK): convolutions whose kernel, at each place, knows the regions of the whole map."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, FEATURES, Card, register
from attnlab.nn.conv_norm import ConvNorm

_COLUMNS = 16  # of a map that are mixed together: few, so that little is multiplied by zeros


def starts(length: int, kernel: int, device: torch.device | None = None) -> Tensor:
    """Where the window of each place begins along an axis: around the place, moved inside at the borders."""
    return (torch.arange(length, device=device) - kernel // 2).clamp(0, length - kernel)


def dynamic_conv(weights: Tensor, values: Tensor) -> Tensor:
    """Σ over the window of weight · value: `(B, G, H, W, k²)`, `(B, G, H, W, c)` to `(B, G, H, W, c)`.

    Windows stay inside the map, as neighborhood attention has them; k is odd and at most H and W. Some columns of a row
    at a time, the weights are laid out as a band in a matrix over the k rows of keys: then it is one product.
    """
    kernel = round(weights.shape[-1] ** 0.5)
    height, width = values.shape[2:4]
    half, inner = kernel // 2, width - kernel // 2
    rows = starts(height, kernel, values.device)[:, None] + torch.arange(kernel, device=values.device)
    keys = values[:, :, rows]  # (B, G, H, k, W, c)
    parts = []
    for begin in range(0, width, _COLUMNS):
        end = min(begin + _COLUMNS, width)
        first = min(max(begin - half, 0), width - kernel)
        span = min(max(end - 1 - half, 0), width - kernel) + kernel - first
        left = min(max(half - begin, 0), end - begin)  # columns whose window is moved right, and so is the same
        right = min(max(end - inner, 0), end - begin - left)
        middle = end - begin - left - right
        taps = weights[:, :, :, begin:end].unflatten(-1, (kernel, kernel))
        at_left, between, at_right = taps.split((left, middle, right), 3)
        band = F.pad(between, (0, span - kernel)).flatten(4)
        # Rows one entry longer than they are read: each is shifted by one more than the row above.
        band = F.pad(band, (0, 1)).flatten(3)[..., : middle * kernel * span].unflatten(-1, (middle, kernel * span))
        ends = [F.pad(at_left, (0, span - kernel)).flatten(4), F.pad(at_right, (span - kernel, 0)).flatten(4)]
        matrix = torch.cat((ends[0], band, ends[1]), 3)
        parts.append(matrix @ keys[:, :, :, :, first : first + span].flatten(3, 4))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 3)


def _resized(x: Any, size: tuple[int, int]) -> Any:
    return None if x is None else F.interpolate(x, size, mode="bilinear", align_corners=False)


@register(
    Card(
        name="context_mix",
        title="OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels",
        paper="2502.20087",
        system="overlock",
        family="spatial",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N k²",
        growth=1.0,
        sample={"heads": 2},
    )
)
class ContextMix(nn.Module):
    """A convolution with a kernel of its own at each place, made from how the place relates to 7×7 regions of the map.

        q = bn(Wq x) / √(C/G);   r = bn(Wk pool₇ₓ₇(context));   v = bn(Wv x)        q, r in G = 2·heads groups
        [a₁, a₂] = Wp (q · r over the regions)                  one Wp for all groups, to S² and K² numbers
        y = bn(Wo [Σ softmax(a₁ + table₁) v₁, Σ softmax(a₂ + table₂) v₂])

    `(B, C, H, W)` to the same, any size. v's first half of channels is mixed over S×S windows, the second over K×K; as
    in neighborhood attention windows stay inside the map, and the tables hold a number per offset. A map of less than K
    places on a side is enlarged bilinearly, and the result averaged back. Affinities and Wp are one product
    q (Wp r)ᵀ, without the 49 numbers between. Cost: O(N·C·(3C/2 + S² + K²)). Source: arXiv 2502.20087.

    Args:
        heads: half the number of groups. kernel, small: K and S, odd, S ≤ K. regions: 7.
        context_dim: channels of a `context` that the regions are of, instead of x; there is then no Wv.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 2,
        kernel: int = 7,
        small: int = 5,
        regions: int = 7,
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % (4 * heads):
            raise ValueError(f"dim must be a multiple of 4 · heads, got {dim} and {heads}")
        if not (kernel % 2 and small % 2 and 1 <= small <= kernel):
            raise ValueError(f"kernel and small must be odd, and small at most kernel, got {kernel} and {small}")
        if regions < 1:
            raise ValueError(f"regions must be at least 1, got {regions}")
        self.dim, self.groups, self.kernel, self.small, self.regions = dim, 2 * heads, kernel, small, regions
        self.scale = (dim // self.groups) ** -0.5
        self.context_dim = context_dim
        self.wq = ConvNorm(dim, dim // 2, 1)
        self.wk = ConvNorm(context_dim or dim, dim // 2, 1)
        self.wv = ConvNorm(dim, dim, 1) if context_dim is None else None
        self.wp = nn.Linear(regions**2, small**2 + kernel**2)
        self.tables = nn.ParameterList(
            nn.init.trunc_normal_(torch.empty(self.groups, 2 * k - 1, 2 * k - 1), std=0.02) for k in (small, kernel)
        )
        self.wo = ConvNorm(dim, dim, 1)

    def positions(self, table: Tensor, size: tuple[int, int]) -> Tensor:
        """The table's numbers for every place and key, `(G, H, W, k²)`."""
        kernel = (table.shape[-1] + 1) // 2
        steps = torch.arange(kernel, device=table.device) + kernel - 1
        rows, columns = (
            (starts(n, kernel, table.device) - torch.arange(n, device=table.device))[:, None] + steps for n in size
        )
        return table[:, rows][..., columns].permute(0, 1, 3, 2, 4).flatten(3)

    def kernels(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """The S×S and the K×K kernels of every place, `(B, G, H, W, S²)` and `(B, G, H, W, K²)`."""
        size = (x.shape[2], x.shape[3])
        q = (self.wq(x) * self.scale).flatten(2).unflatten(1, (self.groups, -1)).mT
        r = self.wk(F.adaptive_avg_pool2d(context, self.regions)).flatten(2).unflatten(1, (self.groups, -1))
        scores = (q @ (r @ self.wp.weight.mT)).unflatten(2, size)
        widths = (self.small**2, self.kernel**2)
        pairs = zip(scores.split(widths, -1), self.wp.bias.split(widths), self.tables, strict=True)
        small, large = ((s + (self.positions(table, size) + b)).softmax(-1) for s, b, table in pairs)
        return small, large

    def enlarged(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size of at least a window on both sides that a map of this size is mixed at."""
        shorter = min(size)
        if shorter >= self.kernel:
            return size
        height, width = (
            self.kernel if n == shorter else max(int(self.kernel / shorter * n), self.kernel) for n in size
        )
        return height, width

    def forward(self, x: Tensor, context: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        """`value (B, C, H, W)`, what is mixed, is wv(x) if not given; `context` has the size of x."""
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        if (context is None) != (self.context_dim is None):
            raise ValueError(f"context goes with context_dim, got {type(context).__name__} and {self.context_dim}")
        given = (x.shape[2], x.shape[3])
        size = self.enlarged(given)
        if size != given:
            x, context, value = (_resized(t, size) for t in (x, context, value))
        if value is None:
            value = x if self.wv is None else self.wv(x)
        halves = value.permute(0, 2, 3, 1).unflatten(-1, (2, self.groups, -1)).permute(3, 0, 4, 1, 2, 5)
        kernels = self.kernels(x, x if context is None else context)
        mixed = [dynamic_conv(k, v).permute(0, 2, 3, 1, 4).flatten(3) for k, v in zip(kernels, halves, strict=True)]
        y = torch.cat(mixed, -1).permute(0, 3, 1, 2)
        return self.wo(y if size == given else F.adaptive_avg_pool2d(y, given))
