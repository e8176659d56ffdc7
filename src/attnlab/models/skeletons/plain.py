"""The plain skeleton: one width from the patches to the head (ViT, DeiT), with any token mechanism as its mixer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab import cards
from attnlab.models.skeletons.parts import MLP, DropPath, Norm, drop_path_rates, residual, trunc_normal_linear
from attnlab.nn.by_rows import by_rows

Mixer = str | Callable[[int], nn.Module]


class TokenBlock(nn.Module):
    """Mix tokens, then channels, each on a pre-norm residual path: (B, N, C) → (B, N, C).

    x = x + drop_path(scale1 · mixer(norm1(x), grid=grid))
    x = x + drop_path(scale2 · mlp(norm2(x)))

    With `mlp_ratio` 0 the second path is not there. `layer_scale` is the start value of a learned scale per channel
    (CaiT, arXiv 2103.17239); None for none.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        norm: Norm = nn.LayerNorm,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1, self.mixer = norm(dim), mixer
        self.norm2 = norm(dim) if mlp_ratio else None
        self.mlp = MLP(dim, int(dim * mlp_ratio), dropout=dropout) if mlp_ratio else None
        self.drop_path = DropPath(drop_path)
        self.scale1: Tensor | None
        self.scale2: Tensor | None
        for name in ("scale1", "scale2"):
            without = layer_scale is None or (name == "scale2" and not mlp_ratio)
            scale = None if without else nn.Parameter(torch.full((dim,), cast(float, layer_scale)))
            self.register_parameter(name, scale)

    def forward(self, x: Tensor, *, grid: tuple[int, ...] | None = None) -> Tensor:
        return self.after(x, self.mixer(self.norm1(x), grid=grid))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The block behind its mixer, whose output for `x` is `y`."""
        through = (self.norm2, self.mlp, self.drop_path)
        return by_rows(lambda x, y: self.feed(self.add(x, y)), x, y, through=[part for part in through if part])

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """The first path's end: `x` and what its mixer said of it, `y`."""
        return residual(x, self.drop_path(y), self.scale1)

    def feed(self, x: Tensor) -> Tensor:
        """The second path."""
        if self.norm2 is None or self.mlp is None:
            return x
        y = self.mlp(self.norm2(x))
        return residual(x, self.drop_path(y), self.scale2)


class Positions(nn.Module):
    """Adds a learned vector to each place of a sequence or grid; for other sizes the table is interpolated.

    (B, prefix + N, C) → the same, N = the product of `grid`. The first `prefix` tokens (a class token) have vectors of
    their own. A grid of one axis is resized linearly, of two axes by antialiased cubics, as timm does.
    """

    def __init__(self, grid: tuple[int, ...], dim: int, *, prefix: int = 0) -> None:
        super().__init__()
        if len(grid) not in (1, 2):
            raise ValueError(f"grid must have one or two axes, got {grid}")
        self.grid, self.prefix = tuple(grid), prefix
        places = torch.Size(grid).numel()
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(prefix + places, dim), std=0.02))

    def resized(self, grid: tuple[int, ...]) -> Tensor:
        """The table for another grid, (prefix + N, C)."""
        if tuple(grid) == self.grid:
            return self.table
        maps = self.table[self.prefix :].t().reshape(1, -1, *self.grid)
        if len(grid) == 1:
            maps = F.interpolate(maps, size=tuple(grid), mode="linear")
        else:
            maps = F.interpolate(maps, size=tuple(grid), mode="bicubic", antialias=True)
        return torch.cat((self.table[: self.prefix], maps[0].flatten(1).t()))

    def forward(self, x: Tensor, *, grid: tuple[int, ...] | None = None) -> Tensor:
        return x + self.resized(self.grid if grid is None else grid)


class Encoder(nn.Module):
    """A stack of blocks of one width and a last norm: tokens (B, N, C) → (B, N, C), for sequences as for grids.

    Args:
        mixer: the name of a registered token mechanism, built with `mixer_options`, or a function of the layer's index
            that builds one. It is called as `mixer(x, grid=grid)`.
        drop_path: rate at the last block; rises linearly from 0.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        mixer: Mixer,
        mixer_options: Mapping[str, Any] | None = None,
        mlp_ratio: float = 4.0,
        norm: Norm = nn.LayerNorm,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        options = dict(mixer_options or {})
        if options and not isinstance(mixer, str):
            raise ValueError("mixer_options goes with the name of a mechanism; a function builds its mixer itself")
        self.blocks = nn.ModuleList(
            TokenBlock(
                dim,
                cards.build(mixer, dim, **options) if isinstance(mixer, str) else mixer(layer),
                mlp_ratio=mlp_ratio,
                norm=norm,
                layer_scale=layer_scale,
                drop_path=rate,
                dropout=dropout,
            )
            for layer, rate in enumerate(drop_path_rates(drop_path, depth))
        )
        self.norm = norm(dim)

    def forward(self, x: Tensor, *, grid: tuple[int, ...] | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, grid=grid)
        return self.norm(x)


class Plain(nn.Module):
    """A plain vision transformer: patches → positions → encoder → class token or mean → head.

        logits (B, num_classes) = plain(images (B, in_channels, H, W))       H and W any multiples of `patch`
        [map (B, dim, H/patch, W/patch), …] = plain.forward_features(images, layers=(2, 5, 8, 11))

    A mixer of grids (windows, neighbourhoods) wants `class_token=False`: the tokens are then the grid and nothing else.
    For sequences use `Encoder` with `Positions((N,), dim)` behind an embedding of your own.

    Args:
        image: the size, int or (H, W), whose positions are learned; they are interpolated for others.
        mixer, mixer_options, mlp_ratio, norm, layer_scale, drop_path, dropout: as for `Encoder`.
        num_classes: 0 for no head: `forward` then returns the pooled features.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        mixer: Mixer,
        mixer_options: Mapping[str, Any] | None = None,
        image: int | tuple[int, int] = 224,
        patch: int = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
        class_token: bool = True,
        mlp_ratio: float = 4.0,
        norm: Norm = nn.LayerNorm,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        size = (image, image) if isinstance(image, int) else image
        if size[0] % patch or size[1] % patch:
            raise ValueError(f"image must be a multiple of patch={patch} on each side, got {size}")
        self.patch, self.in_channels = patch, in_channels
        self.channels, self.reductions = (dim,), (patch,)
        self.patches = nn.Conv2d(in_channels, dim, patch, patch)
        self.class_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim), std=0.02)) if class_token else None
        self.positions = Positions((size[0] // patch, size[1] // patch), dim, prefix=int(class_token))
        self.dropout = nn.Dropout(dropout)
        self.encoder = Encoder(
            dim=dim,
            depth=depth,
            mixer=mixer,
            mixer_options=mixer_options,
            mlp_ratio=mlp_ratio,
            norm=norm,
            layer_scale=layer_scale,
            drop_path=drop_path,
            dropout=dropout,
        )
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(trunc_normal_linear)
        # As quiet as the positions, whatever the patch: the default, large for small patches, would drown them.
        nn.init.trunc_normal_(self.patches.weight, std=0.02)
        nn.init.zeros_(cast(Tensor, self.patches.bias))

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens with their positions, (B, N, C) or (B, 1 + N, C), and the grid that they make."""
        if x.ndim != 4 or x.shape[1] != self.in_channels or x.shape[2] % self.patch or x.shape[3] % self.patch:
            raise ValueError(
                f"x must be images (B, {self.in_channels}, H, W), sides multiples of patch={self.patch}, "
                f"got {tuple(x.shape)}"
            )
        # In channels-last memory a map is its tokens already.
        maps = self.patches(x.contiguous(memory_format=torch.channels_last))
        grid = (maps.shape[2], maps.shape[3])
        tokens = maps.permute(0, 2, 3, 1).flatten(1, 2)
        first = self.first_tokens()
        if first is not None:
            tokens = torch.cat((first.expand(len(x), -1, -1), tokens), dim=1)
        return self.dropout(self.positions(tokens, grid=grid)), grid

    def first_tokens(self) -> Tensor | None:
        """The learned tokens that come before the patches, (1, C), if there are any."""
        return None if self.class_token is None else self.class_token.unsqueeze(0)

    def forward_features(self, x: Tensor, layers: Sequence[int] = (-1,)) -> list[Tensor]:
        """The map (B, dim, H/patch, W/patch) after each of the given blocks, through the last norm."""
        depth = len(self.encoder.blocks)
        wanted = [layer % depth if -depth <= layer < depth else None for layer in layers]
        if None in wanted:
            raise ValueError(f"layers must lie in [-{depth}, {depth}), got {tuple(layers)}")
        tokens, grid = self.embed(x)
        maps = {}
        for layer, block in enumerate(self.encoder.blocks):
            tokens = block(tokens, grid=grid)
            if layer in wanted:
                places = self.encoder.norm(tokens)[:, self.positions.prefix :]
                maps[layer] = places.unflatten(1, grid).permute(0, 3, 1, 2)
        return [maps[layer] for layer in wanted if layer is not None]

    def forward(self, x: Tensor) -> Tensor:
        tokens, grid = self.embed(x)
        tokens = self.encoder(tokens, grid=grid)
        return self.head(tokens.mean(1) if self.class_token is None else tokens[:, 0])
