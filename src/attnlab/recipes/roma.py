"""RoMA: a Mamba network learns from images without labels, by drawing the next cluster of patches from those before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import RECIPE, Card, register
from attnlab.layouts import tiles
from attnlab.models.skeletons.parts import MLP
from attnlab.models.vision.roma import RoMA, sincos
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern


@dataclass(frozen=True)
class Segments(Pattern):
    """Segments of `size` tokens; each query sees the keys of its own segment and of those before."""

    size: int

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q // self.size >= k // self.size


class DrawingBlock(nn.Module):
    """q = q + attention(norm_q q, norm_kv kv), q = q + mlp(norm2 q): queries `(B, N, C)` ask tokens `(B, M, C)`."""

    def __init__(self, dim: int, *, heads: int, mlp_ratio: float = 4.0, bias: bool = True) -> None:
        super().__init__()
        self.norm_q, self.norm_kv, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = MultiHead(dim, heads=heads, bias=bias, out_bias=True)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, q: Tensor, kv: Tensor, pattern: Pattern | None = None) -> Tensor:
        q = q + self.attention(self.norm_q(q), self.norm_kv(kv), pattern=pattern)
        return q + self.mlp(self.norm2(q))


def pixels(images: Tensor, patch: int) -> Tensor:
    """Patches as the decoder draws them: `(B, C, H, W)` to `(B, N, patch²·C)`, channels last, mean 0, variance 1."""
    if images.ndim != 4 or images.shape[2] % patch or images.shape[3] % patch:
        raise ValueError(f"images must be (B, C, H, W), sides multiples of patch={patch}, got {tuple(images.shape)}")
    x = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt()


def blocks(
    drawn: Tensor, wanted: Tensor, grid: tuple[int, int], *, cluster: int = 4, side: int = 6, variant: str = "paper"
) -> tuple[Tensor, Tensor]:
    """Both as blocks of `side`×`side` patches: `(B, blocks, side²·P)` each.

    `drawn` (B, N − cluster², P) in clusters, without the first one; `wanted` (B, N, P) row by row. The blocks that the
    first cluster reaches into are left out. "release" does what the authors' code does: it takes the drawn sequence for
    one that goes row by row, with zeros for the first cluster, and lays its blocks out (P, side²), so that what is
    compared does not belong together.
    """
    if grid[0] % side or grid[1] % side:
        raise ValueError(f"side must divide the grid of patches {grid}, got {side}")
    if variant not in ("paper", "release"):
        raise ValueError(f"variant must be 'paper' or 'release', got {variant!r}")
    whole = F.pad(drawn, (0, 0, cluster**2, 0))
    order = tiles(grid, side)
    target = order.apply(wanted).unflatten(1, (-1, side**2))
    if variant == "release":
        left = -(-(cluster**2) // side**2)
        found = order.apply(whole).unflatten(1, (-1, side**2)).transpose(2, 3)
        return found[:, left:].flatten(2), target[:, left:].flatten(2)
    found = order.apply(tiles(grid, cluster).invert(whole)).unflatten(1, (-1, side**2))
    known = -(-cluster // side)
    at = [
        r * (grid[1] // side) + c for r in range(grid[0] // side) for c in range(grid[1] // side) if max(r, c) >= known
    ]
    return found[:, at].flatten(2), target[:, at].flatten(2)


def drawing_losses(
    drawn: Tensor, images: Tensor, *, patch: int, cluster: int = 4, side: int = 6, variant: str = "paper"
) -> tuple[Tensor, Tensor]:
    """Mean squared errors of what was drawn: patch by patch, and in blocks of `side` patches (see `blocks`)."""
    grid = (images.shape[2] // patch, images.shape[3] // patch)
    wanted = pixels(images, patch)
    next_ones = tiles(grid, cluster).apply(wanted)[:, cluster**2 :]
    if drawn.shape != next_ones.shape:
        raise ValueError(f"drawn must have shape {tuple(next_ones.shape)}, got {tuple(drawn.shape)}")
    coarse = F.mse_loss(*blocks(drawn, wanted, grid, cluster=cluster, side=side, variant=variant))
    return F.mse_loss(drawn, next_ones), coarse


@register(
    Card(
        name="roma_pretraining",
        title="RoMA: Scaling up Mamba-based Foundation Models for Remote Sensing",
        paper="2503.10392",
        system="roma",
        family="self-supervision",
        kind=RECIPE,
        cost="N + M² of the decoder",
    )
)
class RoMAPretraining(nn.Module):
    """Pre-trains a `RoMA` without labels: from the clusters so far it draws the next one, in pixels.

        encoder(clusters 1 … K−1), causal → 4 taps, each normed → one linear map → 4 sequences of `width`
        q = token + sincos of clusters 2 … K,   4 times   q = block(q, its sequence; cluster s + 1 sees clusters ≤ s)
        loss = MSE(linear(norm(q)), patches normalised) + 0.1 · MSE in blocks of 6×6 patches

        pretraining = RoMAPretraining(RoMA(num_classes=0))
        loss = pretraining(rotated, originals, places)         see `adaptive_rotation`

    Trained by AdamW (1.5e-4 · batch/256, weight decay 0.05, 40 epochs of warm-up) for 400 to 800 epochs; afterwards
    `encoder` alone is kept, its norm being that of the last tap. Source: arXiv 2503.10392 (MiliLab/RoMA).

    Args:
        encoder: whose depth gives the taps: behind 6/12, 8/12, 10/12 and all of the blocks.
        width, heads: of the decoder. cluster: its side in patches. side: of the larger blocks.
        variant: of these blocks; "release" compares what does not belong together, see `blocks`.
    """

    def __init__(
        self,
        encoder: RoMA,
        *,
        width: int = 512,
        heads: int | None = None,
        cluster: int = 4,
        side: int = 6,
        coarse_weight: float = 0.1,
        variant: str = "paper",
    ) -> None:
        super().__init__()
        if not isinstance(encoder, RoMA):
            raise TypeError(f"encoder must be a RoMA, got {type(encoder).__name__}")
        if variant not in ("paper", "release"):
            raise ValueError(f"variant must be 'paper' or 'release', got {variant!r}")
        self.encoder, self.cluster, self.side = encoder, cluster, side
        self.coarse_weight, self.variant = coarse_weight, variant
        dim, depth = encoder.channels[0], len(encoder.blocks)
        self.taps = [depth * (3 + i) // 6 - 1 for i in range(4)]
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))  # and the encoder's own
        self.widen = nn.Linear(4 * dim, 4 * width)
        self.blocks = nn.ModuleList(DrawingBlock(width, heads=heads or max(width // 64, 1)) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.draw = nn.Linear(width, encoder.in_channels * encoder.patch**2)
        self.token = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))
        self.angle = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim), std=0.02))
        for part in self.blocks.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    def forward_drawing(self, images: Tensor, turned: Tensor | None = None) -> Tensor:
        """The patches of all clusters but the first, drawn: `(B, N − cluster², patch²·C)`, cluster by cluster.

        `turned` (B, N) bool: the patches, row by row, to which the angle's embedding is added.
        """
        tokens, grid = self.encoder.embed(images)
        if grid[0] % self.cluster or grid[1] % self.cluster or grid == (self.cluster, self.cluster):
            raise ValueError(f"images must hold several clusters of {self.cluster}² patches, got a grid of {grid}")
        if turned is not None:
            if turned.shape != tokens.shape[:2]:
                raise ValueError(f"turned must have shape {tuple(tokens.shape[:2])}, got {tuple(turned.shape)}")
            tokens = tokens + turned.unsqueeze(-1).to(tokens.dtype) * self.angle
        order, many = tiles(grid, self.cluster), self.cluster**2
        found = self.encoder.run(order.apply(tokens)[:, :-many], self.taps)
        norms: list[Any] = [*self.norms, self.encoder.norm]
        seen = self.widen(torch.cat([norm(tap) for norm, tap in zip(norms, found, strict=True)], -1))
        seen = seen.unflatten(-1, (-1, 4))  # the last axis, not the first, is that of the decoder's layers
        q = self.token + order.apply(sincos(grid, len(self.token)).to(seen))[many:]
        q = q.expand(len(images), -1, -1)
        for i, block in enumerate(self.blocks):
            q = block(q, seen[..., i], Segments(many))
        return self.draw(self.norm(q))

    def forward(self, images: Tensor, targets: Tensor | None = None, turned: Tensor | None = None) -> Tensor:
        """The loss, a scalar; `targets` are the images before anything was turned in them (`images` if None)."""
        drawn = self.forward_drawing(images, turned)
        fine, coarse = drawing_losses(
            drawn, images if targets is None else targets, patch=self.encoder.patch, cluster=self.cluster,
            side=self.side, variant=self.variant,
        )  # fmt: skip
        return fine + self.coarse_weight * coarse
