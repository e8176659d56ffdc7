"""Single-head attention (SHViT): a fifth of the channels attend with one head, the rest pass by."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from attnlab.cards import ANY_GRID, FEATURES, Card, register
from attnlab.nn.conv_norm import ConvNorm
from attnlab.nn.spatial.thin import attend_thin


@register(
    Card(
        name="single_head",
        title="SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
        paper="2401.16456",
        system="shvit",
        family="spatial",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N² C/5",
        growth=2.0,
        sample={"width": 12, "key_dim": 8},
    )
)
class SingleHeadAttention(nn.Module):
    """Attention of one head over a part of the channels: no redundant heads, and little memory to move.

        x₁, x₂ = x[:width], x[width:]
        q, k, v = bn(W norm(x₁))            q, k of `key_dim` channels, v of `width`; the norm over the whole map
        y = bn(Wo relu([softmax(q kᵀ / √key_dim) v, x₂]))

    `(B, C, H, W)` to the same, any size. Cost: 2N²(key_dim + width) + 2N·width·(2·key_dim + width) + 2NC².
    Source: arXiv 2401.16456. `width` is C/5 if None. The last batch norm starts at 0, for a residual path.
    """

    def __init__(self, dim: int, *, width: int | None = None, key_dim: int = 16) -> None:
        super().__init__()
        width = max(dim // 5, 1) if width is None else width
        if not 1 <= width <= dim:
            raise ValueError(f"width must be in [1, dim = {dim}], got {width}")
        if key_dim < 1:
            raise ValueError(f"key_dim must be at least 1, got {key_dim}")
        self.dim, self.width, self.key_dim = dim, width, key_dim
        self.norm = nn.GroupNorm(1, width)
        self.wqkv = ConvNorm(width, 2 * key_dim + width, 1)
        self.wo = ConvNorm(dim, dim, 1)
        nn.init.zeros_(self.wo.norm.weight)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, `(B, 1, N, key_dim or width)`, of the map's first `width` channels."""
        tokens = self.wqkv(self.norm(x[:, : self.width])).permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(1)
        q, k, v = tokens.split((self.key_dim, self.key_dim, self.width), -1)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        y = attend_thin(*self.qkv(x)).squeeze(1).mT.unflatten(2, x.shape[2:])
        return self.wo(relu(torch.cat((y, x[:, self.width :]), 1)))
