"""An encoder of maps from axial attention and convolutions, with one residual stream or two reversible ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, FEATURES, Card, register
from attnlab.models.vision.axial import Coordinates
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.axial import along


class AxisBranch(nn.Module):
    """Attention of LN x along one axis of maps (B, H, W, C)."""

    def __init__(self, dim: int, axis: int, *, heads: int, head_dim: int | None) -> None:
        super().__init__()
        self.axis = axis
        self.norm = nn.LayerNorm(dim)
        self.attention = MultiHead(dim, heads=heads, head_dim=head_dim, out_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return along(self.attention, self.norm(x), self.axis)


class StdNorm(nn.Module):
    """(x − mean) / (std + 10⁻⁵) over the channels, then a scale and a shift: outside the root, unlike a layer norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) / (variance.sqrt() + 1e-5) * self.weight + self.bias


class ConvBranch(nn.Module):
    """Two 3×3 convolutions of the normed maps (B, H, W, C), 4C channels and a leaky ReLU between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = StdNorm(dim)
        self.conv1, self.conv2 = nn.Conv2d(dim, 4 * dim, 3, padding=1), nn.Conv2d(4 * dim, dim, 3, padding=1)
        self.act = nn.LeakyReLU()

    def forward(self, x: Tensor) -> Tensor:
        maps = self.norm(x).permute(0, 3, 1, 2)
        return self.conv2(self.act(self.conv1(maps))).permute(0, 2, 3, 1)


@register(
    Card(
        name="axial_encoder",
        title="Axial Attention in Multidimensional Transformers",
        paper="1912.12180",
        system="axial",
        family="sparse",
        kind=FEATURES,
        cost="N (H + W)",
        capabilities=ANY_GRID,
        sample=dict(depth=1, heads=4),
    )
)
class AxialEncoder(nn.Module):
    """Layers of four residual branches: attention down the columns, along the rows, and two of convolutions.

        x ← x + places;  per layer  x ← x + columns(x), x ← x + rows(x), x ← x + conv₁(x), x ← x + conv₂(x)

    Maps (B, C, H, W) → the same shape. With `streams=2`, a ← a + f(b), b ← b + g(a) of each pair of branches f, g, both
    a and b from the input, and their mean in the end. Cost O(N (H + W) C + N C²) a layer.
    Source: lucidrains/axial-attention, after arXiv 1912.12180.

    Args:
        size: (H, W) of the learned places; None for none, and maps of any size.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int = 6,
        heads: int = 8,
        head_dim: int | None = None,
        size: tuple[int, int] | None = None,
        streams: int = 1,
    ) -> None:
        super().__init__()
        if streams not in (1, 2):
            raise ValueError(f"streams must be 1 or 2, got {streams}")
        self.dim, self.size, self.streams = dim, None if size is None else tuple(size), streams
        self.places = None if size is None else Coordinates(size, dim)
        branches: list[nn.Module] = []
        for _ in range(depth):
            branches += [AxisBranch(dim, axis, heads=heads, head_dim=head_dim) for axis in (0, 1)]
            branches += [ConvBranch(dim) for _ in range(2)]
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be maps (B, {self.dim}, H, W), not empty, got {tuple(x.shape)}")
        if self.size is not None and x.shape[2:] != self.size:
            raise ValueError(f"x must be maps of size {self.size}, got {tuple(x.shape[2:])}")
        # In channels-last memory neither kind of branch moves the maps of the other.
        x = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        if self.places is not None:
            x = x + self.places()
        other = x
        for i, branch in enumerate(self.branches):
            if self.streams == 1:
                x = x + branch(x)
            elif i % 2 == 0:
                x = x + branch(other)
            else:
                other = other + branch(x)
        return (x if self.streams == 1 else (x + other) / 2).permute(0, 3, 1, 2)
