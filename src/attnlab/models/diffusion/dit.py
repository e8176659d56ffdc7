"""Diffusion transformers: blocks shifted, scaled and gated by time and class; with mixtures of heads or without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from attnlab.cards import DENOISER, Card, Size, register
from attnlab.models.skeletons.parts import MLP
from attnlab.nn.multihead import MultiHead
from attnlab.nn.softmax.mixture_of_heads import MixtureOfHeads


def sine_table(grid: int, dim: int) -> Tensor:
    """DiT's fixed positions `(grid², dim)`: sines and cosines of the column, then of the row."""
    with torch.device("cpu"):
        turns = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
        angles = torch.arange(grid, dtype=torch.float64)[:, None] * turns
        line = torch.cat((angles.sin(), angles.cos()), 1)  # (grid, dim / 2)
        whole = torch.cat((line.repeat(grid, 1), line.repeat_interleave(grid, 0)), 1)
    return whole.float()


class TimeEmbedding(nn.Module):
    """Times `(B,)`, whole or not, to `(B, dim)`: cosines and sines of 128 frequencies, then an MLP."""

    def __init__(self, dim: int, waves: int = 256) -> None:
        super().__init__()
        self.waves = waves
        self.fc1, self.fc2 = nn.Linear(waves, dim), nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        half = self.waves // 2
        turns = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angles = t.float()[:, None] * turns
        waves = torch.cat((angles.cos(), angles.sin()), -1).to(self.fc1.weight.dtype)
        return self.fc2(silu(self.fc1(waves)))


class DiTBlock(nn.Module):
    """x + gate · attention(shifted norm(x)), then x + gate · MLP(shifted norm(x)), all six from the condition."""

    def __init__(self, dim: int, attention: nn.Module, hidden: int) -> None:
        super().__init__()
        self.attention = attention
        self.mlp = MLP(dim, hidden, activation=partial(nn.GELU, approximate="tanh"))
        self.modulation = nn.Linear(dim, 6 * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(silu(condition)).unsqueeze(1).chunk(6, -1)
        x = torch.addcmul(x, gate1, self.attention(torch.addcmul(shift1, self.norm(x), 1 + scale1)))
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, self.norm(x), 1 + scale2)))


def _size(params: int, dim: int, heads: list[int], shared: list[int], routed: list[int], head_dim: int | None) -> Size:
    each = dict(heads=heads, shared=shared, routed=routed)
    return Size(params, dict(dim=dim, depth=len(heads), head_dim=head_dim, **each))


# MoH-DiT's, by the share of heads that a token uses, in percent. The later blocks of the larger two have more heads.
SIZES = {
    "moh_dit_s2_90": _size(32_997_152, 384, [6] * 12, [3] * 8 + [6] * 4, [2] * 8 + [0] * 4, None),
    "moh_dit_s2_75": _size(32_998_688, 384, [6] * 12, [2] * 2 + [3] * 8 + [6] * 2, [1] * 6 + [2] * 4 + [0] * 2, None),
    "moh_dit_b2_90": _size(130_638_368, 768, [12] * 12, [6] * 5 + [7] * 5 + [12] * 2, [4] * 10 + [0] * 2, None),
    "moh_dit_b2_75": _size(
        130_638_368, 768, [12] * 12, [4] * 2 + [6] * 8 + [12] * 2, [2] * 2 + [3] * 8 + [0] * 2, None
    ),
    "moh_dit_l2_90": _size(
        458_512_416, 1024, [8] * 8 + [16] * 8 + [24] * 8, [8] * 8 + [16] * 16, [0] * 16 + [3] * 8, 64
    ),
    "moh_dit_l2_75": _size(
        458_528_800, 1024, [8] * 8 + [16] * 8 + [24] * 8, [8] * 16 + [12] * 8, [0] * 8 + [4] * 16, 64
    ),
    "moh_dit_xl2_90": _size(
        675_666_464, 1152, [8] * 9 + [16] * 10 + [24] * 9, [8] * 9 + [16] * 19, [0] * 19 + [3] * 9, 72
    ),
    "moh_dit_xl2_75": _size(
        675_689_504, 1152, [8] * 9 + [16] * 10 + [24] * 9, [8] * 9 + [10] * 10 + [14] * 9, [0] * 9 + [2] * 19, 72
    ),
}


@register(
    Card(
        name="dit",
        title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
        paper="2410.11842",
        system="moh",
        family="softmax",
        kind=DENOISER,
        cost="N²",
        sample=dict(size=8, dim=24, depth=2, heads=6, shared=[2, 6], routed=[2, 0], classes=5, mlp_ratio=2.0),
        probe=(4, 8, 8),
        sizes=SIZES,
    )
)
class DiT(nn.Module):
    """Predicts noise (and its variance) of a latent image, given the time and the class.

        patches + fixed positions → blocks conditioned on time + class → shifted norm → linear → image

    x `(B, channels, size, size)`, t `(B,)`, y `(B,)` class numbers (`classes` for none) → `(B, 2·channels or channels,
    size, size)`. Sources: arXiv 2212.09748; with mixtures of heads 2410.11842 (SkyworkAI/MoH).

    Args:
        heads, head_dim, shared, routed: for all blocks, or one for each; shared and routed None for plain attention.
        drop_class: probability with which a label is dropped in training (for guidance without a classifier).
        variance: predict it, too.
    """

    def __init__(
        self,
        *,
        size: int = 32,
        patch: int = 2,
        channels: int = 4,
        dim: int = 1152,
        depth: int = 28,
        heads: int | Sequence[int] = 16,
        head_dim: int | Sequence[int | None] | None = None,
        shared: int | Sequence[int] | None = None,
        routed: int | Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        classes: int = 1000,
        drop_class: float = 0.1,
        variance: bool = True,
    ) -> None:
        super().__init__()
        if size < 1 or size % patch:
            raise ValueError(f"size must be a multiple of patch = {patch}, got {size}")
        if dim % 4:
            raise ValueError(f"dim must be a multiple of 4, got {dim}")
        given = {"heads": heads, "head_dim": head_dim, "shared": shared, "routed": routed}
        each = {n: list(v) if isinstance(v, Sequence) else [v] * depth for n, v in given.items()}
        for name, values in each.items():
            if len(values) != depth:
                raise ValueError(f"{name} must be one or one for each of {depth} blocks, got {len(values)}")
        self.size, self.patch, self.channels, self.classes, self.drop_class = size, patch, channels, classes, drop_class
        self.out_channels = channels * (2 if variance else 1)
        self.embedding = nn.Conv2d(channels, dim, patch, patch)
        self.positions = nn.Parameter(sine_table(size // patch, dim)[None], requires_grad=False)
        self.time = TimeEmbedding(dim)
        self.label = nn.Embedding(classes + (drop_class > 0), dim)
        blocks = []
        for h, d, s, r in zip(*each.values(), strict=True):
            attention: nn.Module
            if s is None or r is None:
                attention = MultiHead(dim, heads=h, head_dim=d, bias=True)
            else:
                attention = MixtureOfHeads(dim, heads=h, head_dim=d, shared=s, routed=r, bias=True)
            blocks.append(DiTBlock(dim, attention, int(dim * mlp_ratio)))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, patch * patch * self.out_channels)
        self.reset()

    def reset(self) -> None:
        """Blocks that change nothing and an output of zero at first, as the authors begin."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.embedding.weight.flatten(1))
        if self.embedding.bias is not None:
            nn.init.zeros_(self.embedding.bias)
        for table in (self.label.weight, self.time.fc1.weight, self.time.fc2.weight):
            nn.init.normal_(table, std=0.02)
        silent = [m.modulation for m in self.modules() if isinstance(m, (DiTBlock, DiT))]
        for linear in (*silent, self.head):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if x.shape[1:] != (self.channels, self.size, self.size):
            raise ValueError(f"x must be (B, {self.channels}, {self.size}, {self.size}), got {tuple(x.shape)}")
        if t.shape != x.shape[:1] or y.shape != x.shape[:1]:
            raise ValueError(f"t and y must be ({len(x)},), got {tuple(t.shape)} and {tuple(y.shape)}")
        if self.training and self.drop_class > 0:
            y = y.masked_fill(torch.rand(y.shape, device=y.device) < self.drop_class, self.classes)
        tokens = self.embedding(x).flatten(2).mT + self.positions
        condition = self.time(t) + self.label(y)
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(silu(condition)).unsqueeze(1).chunk(2, -1)
        tokens = self.head(torch.addcmul(shift, self.norm(tokens), 1 + scale))
        side = self.size // self.patch
        pixels = tokens.unflatten(1, (side, side)).unflatten(-1, (self.patch, self.patch, -1))
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, self.size, self.size)
