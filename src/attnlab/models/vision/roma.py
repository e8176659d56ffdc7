"""RoMA: a plain vision network of one-directional Mamba blocks, as it is pre-trained on satellite images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.layouts import Layout, tiles
from attnlab.models.skeletons.decoder import DecoderBlock, SwiGLU
from attnlab.models.skeletons.parts import DropPath, drop_path_rates, trunc_normal_linear
from attnlab.nn.linear.selective import Mamba

# Parameters: the authors' patches and blocks, to which come the last norm and a classifier of 1,000 classes.
SIZES = {
    f"roma_{name}": Size(encoder + 2 * dim + 1000 * (dim + 1), {"dim": dim, "depth": depth})
    for name, encoder, dim, depth in (
        ("tiny", 5_219_520, 192, 12),
        ("small", 20_281_728, 384, 12),
        ("base", 79_934_208, 768, 12),
        ("large", 282_313_696, 1024, 24),
    )
}


def sincos(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed positions of a grid `(H·W, dim)`: sines and cosines of the column, then of the row (MAE, 2111.06377)."""
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4, got {dim}")
    # In double, as the authors' checkpoints have them.
    speeds = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.outer(torch.arange(n, dtype=torch.float64), speeds) for n in grid)
    across = torch.cat((columns.sin(), columns.cos()), 1).expand(grid[0], -1, -1)
    down = torch.cat((rows.sin(), rows.cos()), 1).unsqueeze(1).expand(-1, grid[1], -1)
    return torch.cat((across, down), 2).flatten(0, 1).float()


class RoMABlock(DecoderBlock):
    """x = x + drop_path(mamba(norm1 x)), x = x + drop_path(swiglu(norm2 x)): `(B, N, C)` to the same, causal."""

    def __init__(self, dim: int, *, states: int = 16, drop_path: float = 0.0) -> None:
        mixer = Mamba(dim, states=states, expand=1)
        super().__init__(dim, mixer, SwiGLU(dim, dim * 8 // 3, bias=True), norm=nn.LayerNorm)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))  # type: ignore[misc]


@register(
    Card(
        name="roma",
        title="RoMA: Scaling up Mamba-based Foundation Models for Remote Sensing",
        paper="2503.10392",
        system="roma",
        family="linear",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
        sample={"dim": 16, "depth": 2, "patch": 8, "states": 4, "num_classes": 10},
        probe=(32, 48),
        sizes=SIZES,
    )
)
class RoMA(nn.Module):
    """A backbone for very large images: patches read once, in one direction, by Mamba; linear in their number.

        x = patches(image) + sincos,   then depth times   x = x + mamba(norm x),  x = x + swiglu(norm x)
        logits = head(mean over tokens of norm(x))

    Images `(B, in_channels, H, W)`, H and W any multiples of `patch`, to `(B, num_classes)`. A token knows those read
    before it, the last one all. It is pre-trained without labels by `attnlab.recipes.roma`. Mamba has expand 1; the
    gated feed-forward is ⌊8C/3⌋ wide. Cost O(N C (C + S)).
    Source: arXiv 2503.10392 (MiliLab/RoMA).

    Args:
        cluster: read clusters of `cluster`×`cluster` patches one after another, as in pre-training; None for row by
            row, as the authors fine-tune.
        states: S of Mamba. num_classes: 0 for no head: `forward` then gives the mean token.
        drop_path: rate at the last block; rises linearly from 0.
    """

    def __init__(
        self,
        *,
        dim: int = 768,
        depth: int = 12,
        patch: int = 16,
        states: int = 16,
        cluster: int | None = None,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"dim must be a multiple of 4, for the positions, got {dim}")
        if cluster is not None and cluster < 1:
            raise ValueError(f"cluster must be at least 1, or None, got {cluster}")
        self.patch, self.in_channels, self.cluster = patch, in_channels, cluster
        self.channels, self.reductions = (dim,), (patch,)
        self.patches = nn.Conv2d(in_channels, dim, patch, patch)
        self.blocks = nn.ModuleList(
            RoMABlock(dim, states=states, drop_path=rate) for rate in drop_path_rates(drop_path, depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        fan_in = in_channels * patch * patch
        nn.init.trunc_normal_(self.patches.weight, std=math.sqrt(1 / fan_in))
        nn.init.zeros_(self.patches.bias)  # type: ignore[arg-type]
        self.head.apply(trunc_normal_linear)

    def order(self, grid: tuple[int, int]) -> Layout | None:
        """The order in which patches are read, if not row by row."""
        if self.cluster is None:
            return None
        if grid[0] % self.cluster or grid[1] % self.cluster:
            raise ValueError(f"x must have a grid of patches that clusters of {self.cluster} fill, got {grid}")
        return tiles(grid, self.cluster)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens with their positions, `(B, N, C)` row by row, and their grid."""
        if x.ndim != 4 or x.shape[1] != self.in_channels or x.shape[2] % self.patch or x.shape[3] % self.patch:
            raise ValueError(
                f"x must be images (B, {self.in_channels}, H, W), sides multiples of patch={self.patch}, "
                f"got {tuple(x.shape)}"
            )
        maps = self.patches(x.contiguous(memory_format=torch.channels_last))
        grid = (maps.shape[2], maps.shape[3])
        tokens = maps.permute(0, 2, 3, 1).flatten(1, 2)
        return tokens + sincos(grid, tokens.shape[2]).to(tokens), grid

    def run(self, tokens: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Tokens behind each of the blocks `layers`, before the norm, and nothing of the blocks after those."""
        found = {}
        for index, block in enumerate(self.blocks[: max(layers) + 1]):
            tokens = block(tokens)
            if index in layers:
                found[index] = tokens
        return [found[index] for index in layers]

    def tokens(self, x: Tensor, layers: Sequence[int]) -> tuple[list[Tensor], tuple[int, int]]:
        """Normed tokens behind the given blocks, row by row, and the grid."""
        depth = len(self.blocks)
        if not all(-depth <= layer < depth for layer in layers):
            raise ValueError(f"layers must lie in [-{depth}, {depth}), got {tuple(layers)}")
        tokens, grid = self.embed(x)
        order = self.order(grid)
        if order is not None:
            tokens = order.apply(tokens)
        found = [self.norm(t) for t in self.run(tokens, [layer % depth for layer in layers])]
        return (found if order is None else [order.invert(t) for t in found]), grid

    def forward_features(self, x: Tensor, layers: Sequence[int] = (-1,)) -> list[Tensor]:
        """The map `(B, dim, H/patch, W/patch)` behind each of the given blocks, through the last norm."""
        found, grid = self.tokens(x, layers)
        return [t.unflatten(1, grid).permute(0, 3, 1, 2) for t in found]

    def forward(self, x: Tensor) -> Tensor:
        tokens, _ = self.embed(x)
        order = self.order((x.shape[2] // self.patch, x.shape[3] // self.patch))
        tokens = self.run(tokens if order is None else order.apply(tokens), [len(self.blocks) - 1])[0]
        return self.head(self.norm(tokens).mean(1))
