"""The Axial Transformer: an autoregressive model of images whose context is computed in parallel, rows at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import LM, Card, Size, register
from attnlab.models.skeletons.parts import MLP
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.axial import along

ROWS, COLUMNS = 1, 0  # the axis along which a row, or a column, runs


class SigmoidGELU(nn.Module):
    """x σ(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class AxialBlock(nn.Module):
    """x += attention along one axis of LN x; x += MLP of LN x: maps (B, H, W, C) → the same, or `(y, state)`."""

    def __init__(
        self, dim: int, heads: int, axis: int, *, causal: bool = False, mlp_ratio: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.axis = axis
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = MultiHead(dim, heads=heads, bias=True, causal=causal)
        self.mlp = MLP(dim, int(dim * mlp_ratio), activation=SigmoidGELU)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        if state is None:
            y = along(self.attention, self.norm1(x), self.axis)
        else:
            y, state = along(self.attention, self.norm1(x), self.axis, state=state)
        x = x + self.dropout(y)
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return x if state is None else (x, state)


class Coordinates(nn.Module):
    """A learned vector per row and one per column, summed: (H, W, dim)."""

    def __init__(self, size: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(_table(size[0], dim))
        self.columns = nn.Parameter(_table(size[1], dim))

    def forward(self) -> Tensor:
        return self.rows[:, None] + self.columns


def _table(places: int, dim: int) -> Tensor:
    return torch.randn(places, dim) * (5.0 / dim**0.5)


@register(
    Card(
        name="axial_transformer",
        title="Axial Attention in Multidimensional Transformers",
        paper="1912.12180",
        system="axial",
        family="sparse",
        kind=LM,
        cost="C N (H + W)",
        sample=dict(dim=16, levels=40, size=(5, 4), channels=3, heads=2, exterior=2, outer=2, inner=1),
        sizes={
            "axial_transformer_imagenet32": Size(params=341_178_112, arguments={}),
            "axial_transformer_imagenet64": Size(params=606_161_152, arguments=dict(dim=2048, size=64)),
        },
        probe=(3, 5, 4),
    )
)
class AxialTransformer(nn.Module):
    """Models images channel by channel, each in row-major order, with attention along rows and columns alone.

        h = exterior(conv[x_<c, c] + places)              channels before, seen whole: rows and columns, no mask
        u = down(outer(E x_c + places + h))               all rows above: rows whole, columns masked, one row down
        logits = W LN inner(right(E x_c) + u + places + h)          the row so far: rows masked, one place right

        logits (B, C, H, W, levels) = model(images (B, C, H, W), of integers)        each place from those before alone
        images (B, C, H, W) = model.sample(batch)

    One channel has no exterior. Sampling costs about one forward: a row's `outer` is computed at once, the keys
    and values of its columns remembered, and only `inner` runs place by place. Cost O(C N (H + W)).
    Source: arXiv 1912.12180 (google-research/axial). Sizes: its configurations of ImageNet 32 and 64.

    Args:
        dim, heads, mlp_ratio, dropout: of the blocks.
        levels: values that a place can take.
        size: of the image, int or (H, W).
        exterior, outer, inner: numbers of blocks; the first two in pairs of a row and a column block.
    """

    def __init__(
        self,
        *,
        dim: int = 1536,
        levels: int = 256,
        size: int | tuple[int, int] = 32,
        channels: int = 3,
        heads: int = 16,
        exterior: int = 8,
        outer: int = 8,
        inner: int = 8,
        mlp_ratio: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, count in (("exterior", exterior), ("outer", outer)):
            if count < 0 or count % 2:
                raise ValueError(f"{name} must be even, a row block and a column block each time, got {count}")
        if min(inner, channels) < 1 or levels < 2:
            raise ValueError(f"inner and channels must be at least 1 and levels 2, got {inner}, {channels}, {levels}")
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.levels, self.channels = levels, channels

        def block(axis: int, causal: bool = False) -> AxialBlock:
            return AxialBlock(dim, heads, axis, causal=causal, mlp_ratio=mlp_ratio, dropout=dropout)

        self.conv = nn.Conv2d(2 * channels, dim, 3, padding=1) if channels > 1 else None
        self.exterior_places = Coordinates(self.size, dim) if channels > 1 else None
        self.exterior = nn.ModuleList(block(COLUMNS if i % 2 else ROWS) for i in range(exterior if channels > 1 else 0))
        self.embedding = nn.Embedding(levels, dim)
        self.places = Coordinates(self.size, dim)
        self.outer = nn.ModuleList(block(COLUMNS, causal=True) if i % 2 else block(ROWS) for i in range(outer))
        self.inner = nn.ModuleList(block(ROWS, causal=True) for _ in range(inner))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, levels)
        self._initialise()

    def _initialise(self) -> None:
        """Variance 1/fan-in; next to nothing where a residual branch or the model ends, so that it starts uniform."""
        last = {self.head, *(m.wo for m in self.modules() if isinstance(m, MultiHead))}
        last |= {m.fc2 for m in self.modules() if isinstance(m, MLP)}
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                variance = (1e-10 if module in last else 1.0) / module.weight[0].numel()
                # 0.88: the spread of a unit normal cut off at two.
                std = variance**0.5 / 0.87962566
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.embedding.weight.copy_(_table(self.levels, self.embedding.embedding_dim))

    def _check(self, images: Tensor) -> None:
        if images.shape[1:] != (self.channels, *self.size) or 0 in images.shape:
            raise ValueError(f"images must be (B, {self.channels}, {self.size[0]}, {self.size[1]}), got "
                             f"{tuple(images.shape)}")  # fmt: skip
        if images.is_floating_point():
            raise TypeError(f"images must be integers in [0, {self.levels}), got {images.dtype}")

    def context(self, images: Tensor, channel: Tensor) -> Tensor | None:
        """What the channels before `channel (B,)` say of it, (B, H, W, dim); None if there is only one channel."""
        if self.conv is None or self.exterior_places is None:
            return None
        index = torch.arange(self.channels, device=images.device)
        planes = (index == channel[:, None])[:, :, None, None].to(self.conv.weight.dtype).expand(images.shape)
        before = (index < channel[:, None])[:, :, None, None]
        seen = torch.where(before, images, 0).to(planes.dtype) / (self.levels - 1)
        h = self.conv(torch.cat((seen, planes), 1)).permute(0, 2, 3, 1) + self.exterior_places()
        for block in self.exterior:
            h = block(h)
        return h

    def plane(self, values: Tensor, context: Tensor | None) -> Tensor:
        """Logits (B, H, W, levels) of the one channel `values (B, H, W)`."""
        h, base = self.embedding(values), self.places()
        if context is not None:
            base = base + context
        u = h + base
        for block in self.outer:
            u = block(u)
        x = F.pad(h, (0, 0, 1, -1)) + F.pad(u, (0, 0, 0, 0, 1, -1)) + base
        for block in self.inner:
            x = block(x)
        return self.head(self.norm(x))

    def channel_logits(self, images: Tensor, channel: Tensor) -> Tensor:
        """Logits (B, H, W, levels) of one channel of each image, `channel (B,)`: a random one, say, in training."""
        self._check(images)
        values = images[torch.arange(len(images), device=images.device), channel]
        return self.plane(values, self.context(images, channel))

    def forward(self, images: Tensor) -> Tensor:
        self._check(images)
        channel = torch.arange(self.channels, device=images.device).repeat(len(images))
        each = images.repeat_interleave(self.channels, 0)
        return self.plane(images.flatten(0, 1), self.context(each, channel)).unflatten(0, (-1, self.channels))

    @torch.no_grad()
    def sample(
        self,
        batch: int = 1,
        *,
        noise: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """New images (B, C, H, W): the largest of logits + temperature · Gumbel noise, place by place.

        `noise`, if given, is (B, C, H, W, levels) standard Gumbel noise. Call it in evaluation mode.
        """
        device, shape = self.embedding.weight.device, (batch, self.channels, *self.size)
        if noise is None:
            noise = -torch.empty(*shape, self.levels, device=device).exponential_(generator=generator).log()
        if noise.shape != (*shape, self.levels):
            raise ValueError(f"noise must have shape {(*shape, self.levels)}, got {tuple(noise.shape)}")
        images = torch.zeros(shape, dtype=torch.long, device=device)
        for c in range(self.channels):
            context = self.context(images, torch.full((batch,), c, device=device))
            images[:, c] = self._sample_plane(temperature * noise[:, c], context)
        return images

    def _sample_plane(self, noise: Tensor, context: Tensor | None) -> Tensor:
        batch, (height, width) = len(noise), self.size
        base = self.places() if context is None else self.places() + context
        base = base.expand(batch, -1, -1, -1)
        values = torch.zeros(batch, height, width, dtype=torch.long, device=noise.device)
        above = torch.zeros_like(base[:, :1])
        columns = [b.attention.initial_state(batch * width) if b.attention.causal else None for b in self.outer]  # type: ignore[union-attr,operator]
        for row in range(height):
            states = [b.attention.initial_state(batch) for b in self.inner]  # type: ignore[union-attr,operator]
            left = torch.zeros_like(above[:, :, :1])
            for place in range(width):
                x = left + above[:, :, place : place + 1] + base[:, row : row + 1, place : place + 1]
                for i, block in enumerate(self.inner):
                    x, states[i] = block(x, states[i])
                scores = self.head(self.norm(x))[:, 0, 0] + noise[:, row, place]
                values[:, row, place] = scores.argmax(-1)
                left = self.embedding(values[:, row : row + 1, place : place + 1])
            if row + 1 < height:
                above = self.embedding(values[:, row : row + 1]) + base[:, row : row + 1]
                for i, block in enumerate(self.outer):
                    if columns[i] is None:
                        above = block(above)
                    else:
                        above, columns[i] = block(above, columns[i])
        return values
