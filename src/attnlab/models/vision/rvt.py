"""RVT, a vision transformer built for corrupted images, with token-aware pooling (TAP-RVT) or without."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from attnlab.cards import BACKBONE, Card, Size, register
from attnlab.models.skeletons.pyramid import Block, Pyramid
from attnlab.nn.conv_norm import ConvNorm
from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.token_pooling import TokenPooling


def _size(
    params: int, dims: tuple[int, ...], depths: tuple[int, ...], heads: tuple[int, ...], scales: int, local: bool = True
) -> Size:
    return Size(params, {"dims": dims, "depths": depths, "heads": heads, "scales": scales, "local": local})


# Parameters of the authors' networks at 1,000 classes. Their plain RVT-B, unlike its TAP form, has ordinary MLPs.
SIZES = {
    "rvt_tiny": _size(8_646_376, (192, 384), (10, 2), (6, 12), 0),
    "rvt_small": _size(22_148_392, (384,), (12,), (6,), 0),
    "rvt_base": _size(86_223_784, (768,), (12,), (12,), 0, local=False),
    "tap_rvt_tiny": _size(8_744_968, (192, 384), (10, 2), (6, 12), 4),
    "tap_rvt_small": _size(22_316_104, (384,), (12,), (6,), 4),
    "tap_rvt_base": _size(87_091_912, (768,), (12,), (12,), 4),
}


class NormedMLP(nn.Module):
    """An MLP with a batch norm behind each layer and a depth-wise 3×3 between: (B, H, W, C) to the same."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = ConvNorm(dim, hidden, 1), ConvNorm(hidden, dim, 1)
        self.dwconv = ConvNorm(hidden, hidden, 3, groups=hidden)
        for part in (self.fc1, self.dwconv, self.fc2):
            # Idle before a batch norm, but the authors' checkpoints have it.
            part.conv.bias = nn.Parameter(part.conv.weight.new_zeros(part.conv.out_channels))
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x.permute(0, 3, 1, 2)))
        return self.fc2(self.act(self.dwconv(x))).permute(0, 2, 3, 1)


class PooledNorm(nn.Module):
    """What attention sees of a map (B, H, W, C): pooled by each place's own choice, then normed."""

    def __init__(self, dim: int, scales: int, norm: nn.Module) -> None:
        super().__init__()
        self.pool, self.norm = TokenPooling(dim, scales=scales), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class RobustBlock(Block):
    """Attention of all places, on the pooled map where `scales` is not 0, then an MLP, by default with
    a convolution: (B, C, H, W).

    x = x + drop_path(attention(norm1(tap(x))));  x = x + drop_path(mlp(norm2(x)))
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        mlp_ratio: float = 4.0,
        scales: int = 4,
        local: bool = True,
        qkv_bias: bool = True,
        eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(
            dim,
            MultiHead(dim, heads=heads, bias=qkv_bias, out_bias=True),
            layout="tokens",
            mlp=NormedMLP(dim, int(dim * mlp_ratio)) if local else mlp_ratio,
            norm=partial(nn.LayerNorm, eps=eps),
            drop_path=drop_path,
        )
        if scales:
            self.norm1 = PooledNorm(dim, scales, self.norm1)


@register(
    Card(
        name="rvt",
        title="Robustifying Token Attention for Vision Transformers",
        paper="2303.11126",
        system="tap_adl",
        family="spatial",
        kind=BACKBONE,
        cost="N²",
        growth=2.0,
        sample={"dims": (16, 32), "depths": (2, 1), "heads": (2, 4), "num_classes": 10},
        sizes=SIZES,
    )
)
class RVT(Pyramid):
    """RVT (arXiv 2105.07926): a convolutional stem to 1/16, attention of all places, and no positions but those that
    convolutions know; with `scales` token-aware pooling (arXiv 2303.11126) in every block.

    Images (B, in_channels, H, W), any size, → logits (B, num_classes). Cost per block: 12NC² + 2N²C.
    In training add `recipes.robust_attention.diversity_loss` of its maps. `hub.load_official` reads the authors'
    checkpoints, and `nn.conv_norm.fold_norms` folds their batch norms for inference. Not here: the position-aware
    scaling of RVT's "plus" networks, which fixes the number of tokens.

    Args:
        dims, depths, heads: of each stage; later stages halve the map by a depth-wise convolution that widens it.
        scales: of the pooling; 0 for plain RVT. local: convolutions and batch norms in the MLPs.
    """

    def __init__(
        self,
        *,
        dims: tuple[int, ...] = (384,),
        depths: tuple[int, ...] = (12,),
        heads: tuple[int, ...] = (6,),
        scales: int = 4,
        local: bool = True,
        mlp_ratio: float = 4.0,
        in_channels: int = 3,
        num_classes: int = 1000,
        **pyramid: Any,
    ) -> None:
        if len(heads) != len(dims):
            raise ValueError(f"heads must have one entry per stage, got {len(heads)} for {len(dims)} stages")
        stem = nn.Sequential(
            nn.Conv2d(in_channels, 32, 7, 2, 2),
            nn.BatchNorm2d(32),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(32, dims[0], 4, 4),
        )
        super().__init__(
            dims=dims,
            depths=depths,
            strides=(16, *(2 for _ in dims[1:])),
            stem=stem,
            downsample=lambda dim, out, stride: nn.Conv2d(dim, out, stride + 1, stride, stride // 2, groups=dim),
            block=lambda place: RobustBlock(
                place.dim,
                heads=heads[place.stage],
                mlp_ratio=mlp_ratio,
                scales=scales,
                local=local,
                drop_path=place.drop_path,
            ),
            in_channels=in_channels,
            num_classes=num_classes,
            **pyramid,
        )
        self.head = nn.Sequential(nn.LayerNorm(dims[-1], eps=1e-6), self.head)  # type: ignore[assignment]
