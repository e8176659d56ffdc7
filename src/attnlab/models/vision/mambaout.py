"""MambaOut: a pyramid of gated CNN blocks, Mamba's without the state space, as a question to state spaces."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import ChannelNorm, ConvStem, Downsample, DropPath
from attnlab.models.skeletons.pyramid import Place, Pyramid
from attnlab.nn.spatial.gated_cnn import GatedCNN

# Parameters with 1,000 classes, as the authors' code has; drop path as their training scripts set it.
SIZES = {
    name: Size(params, {"dims": dims, "depths": depths, "drop_path": drop_path})
    for name, params, dims, depths, drop_path in (
        ("mambaout_femto", 7_304_536, (48, 96, 192, 288), (3, 3, 9, 3), 0.025),
        ("mambaout_kobe", 9_141_208, (48, 96, 192, 288), (3, 3, 15, 3), 0.025),
        ("mambaout_tiny", 26_545_096, (96, 192, 384, 576), (3, 3, 9, 3), 0.2),
        ("mambaout_small", 48_488_072, (96, 192, 384, 576), (3, 4, 27, 3), 0.4),
        ("mambaout_base", 84_813_092, (128, 256, 512, 768), (3, 4, 27, 3), 0.6),
    )
}

_norm = partial(ChannelNorm, eps=1e-6)


class GatedBlock(nn.Module):
    """x + mixer(norm(x)), `(B, C, H, W)` to the same: the mixer mixes places and channels both."""

    def __init__(self, dim: int, mixer: GatedCNN, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm, self.mixer, self.drop_path = _norm(dim), mixer, DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mixer(self.norm(x)))


class MLPHead(nn.Module):
    """fc2(dropout(norm(gelu(fc1(x))))), `(B, C)` to `(B, num_classes)`, with 4C channels in between."""

    def __init__(self, dim: int, num_classes: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.norm = nn.LayerNorm(4 * dim, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(4 * dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(self.norm(F.gelu(self.fc1(x)))))


@register(
    Card(
        name="mambaout",
        title="MambaOut: Do We Really Need Mamba for Vision?",
        paper="2405.07992",
        system="mambaout",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
        sample={"dims": (8, 12, 16, 20), "depths": (1, 1, 1, 1), "num_classes": 10},
        probe=(64, 48),
        sizes=SIZES,
    )
)
class MambaOut(Pyramid):
    """An image backbone of gated convolutions, linear in pixels, at any image size; it asks what an SSM would add.

        stem (two 3×3 of stride 2) → [x + gated_cnn(norm(x))] × depth, four stages → mean → norm → MLP head

    Images `(B, in_channels, H, W)` to logits `(B, num_classes)`; `forward_features` gives maps at strides 4, 8, 16, 32.
    The paper's criterion of tasks that are long enough for a state space is `attnlab.lens.long_sequence`.
    Source: arXiv 2405.07992 (yuweihao/MambaOut).

    Args:
        dims, depths: of each stage. kernel, expansion, conv_ratio: of the mixer, see `GatedCNN`.
        dropout: in the head, before its last layer.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (96, 192, 384, 576),
        depths: Sequence[int] = (3, 3, 9, 3),
        kernel: int = 7,
        expansion: float = 8 / 3,
        conv_ratio: float = 1.0,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        if dims[0] < 2:
            raise ValueError(f"dims must begin with at least 2, of which the stem takes half, got {dims[0]}")

        def block(place: Place) -> nn.Module:
            mixer = GatedCNN(place.dim, kernel=kernel, expansion=expansion, conv_ratio=conv_ratio)
            return GatedBlock(place.dim, mixer, drop_path=place.drop_path)

        super().__init__(
            dims=dims,
            depths=depths,
            strides=(4, *(2,) * (len(dims) - 1)),
            stem=ConvStem((in_channels, dims[0] // 2, dims[0]), norm=_norm, activation=nn.GELU, last_norm=_norm),
            downsample=partial(Downsample, kernel=3, padding=1, norm=_norm),
            block=block,
            in_channels=in_channels,
            num_classes=0,
            drop_path=drop_path,
        )
        self.pooled_norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = MLPHead(dims[-1], num_classes, dropout=dropout) if num_classes else nn.Identity()  # type: ignore[assignment]
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(cast(Tensor, module.bias))

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.pooled_norm(x.mean((2, 3))))
