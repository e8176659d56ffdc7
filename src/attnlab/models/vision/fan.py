"""FAN, a fully attentional network whose MLPs gate channels by what they see, with token-aware pooling or without."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.cards import BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import MLP, ChannelNorm, Downsample, DropPath, NormFirst, trunc_normal_linear
from attnlab.models.skeletons.pyramid import Block, Pyramid
from attnlab.models.vision.rvt import PooledNorm
from attnlab.nn.conv_norm import ConvNorm
from attnlab.nn.cross.class_attention import ClassAttention
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.multihead import MultiHead

_LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)
_CHANNEL_NORM = partial(ChannelNorm, eps=1e-6)

# Width, depth, heads, depths of the convolutional stem; parameters of the authors' networks at 1,000 classes, plain
# and with pooling at four scales.
_TABLE: dict[str, tuple[int, int, int, tuple[int, int] | None, int, int]] = {
    "tiny_12_p16_224": (192, 12, 4, None, 7_319_920, 7_404_688),
    "small_12_p16_224": (384, 12, 8, None, 28_345_336, 28_513_048),
    "base_18_p16_224": (448, 18, 8, None, 54_350_320, 54_643_360),
    "large_24_p16_224": (480, 24, 10, None, 80_574_100, 80_992_468),
    "tiny_8_p4_hybrid": (192, 8, 8, (3, 3), 7_467_240, 7_523_752),
    "small_12_p4_hybrid": (384, 10, 8, (3, 3), 26_117_944, 26_257_704),
    "base_16_p4_hybrid": (448, 16, 8, (3, 3), 50_475_048, 50_735_528),
    "large_16_p4_hybrid": (480, 22, 10, (3, 5), 76_855_140, 77_238_644),
}
SIZES = {
    f"{prefix}fan_{name}": Size(
        (plain, pooled)[scales > 0],
        {"dim": dim, "depth": depth, "heads": heads, "stem_depths": stem, "scales": scales},
    )
    for name, (dim, depth, heads, stem, plain, pooled) in _TABLE.items()
    for prefix, scales in (("", 0), ("tap_", 4))
}


class FourierPositions(nn.Module):
    """Adds a learned projection of sines and cosines of the row and the column, for any grid: (B, C, H, W) to it."""

    def __init__(self, dim: int, hidden: int = 32) -> None:
        super().__init__()
        self.hidden, self.project = hidden, nn.Linear(2 * hidden, dim)

    def waves(self, length: int, like: Tensor) -> Tensor:
        """(length, hidden) of the places of one axis, which reaches from above 0 to 2π."""
        at = torch.arange(1, length + 1, device=like.device, dtype=torch.float32) / (length + 1e-6) * 2 * math.pi
        power = torch.arange(0, self.hidden, 2, device=like.device, dtype=torch.float32) / self.hidden
        angle = at[:, None] / 10_000**power
        return torch.stack((angle.sin(), angle.cos()), -1).flatten(1).to(like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        rows, columns = self.waves(height, x)[:, None], self.waves(width, x)[None]
        waves = torch.cat((rows.expand(-1, width, -1), columns.expand(height, -1, -1)), -1)
        return x + self.project(waves).permute(2, 0, 1)


class ConvNeXtBlock(nn.Module):
    """x + scale · mlp(norm(depth-wise 7×7(x))), (B, C, H, W) to the same (arXiv 2201.03545)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv, self.norm, self.mlp = DepthwiseConv(dim, 7), _LAYER_NORM(dim), MLP(dim, 4 * dim)
        self.scale = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.scale * self.mlp(self.norm(self.conv(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


def conv_stem(in_channels: int, dim: int) -> nn.Sequential:
    """Four 3×3 convolutions of stride 2 with batch norms."""
    widths = (in_channels, dim // 8, dim // 4, dim // 2, dim)
    return nn.Sequential(
        *(ConvNorm(widths[i], widths[i + 1], 3, 2, activation=nn.GELU() if i < 3 else None) for i in range(4))
    )


class HybridStem(nn.Sequential):
    """Two stages of a ConvNeXt, to 1/8, then 2×2 patches."""

    def __init__(self, in_channels: int, dim: int, depths: tuple[int, int], width: int = 128) -> None:
        super().__init__()
        self.patches = Downsample(in_channels, width, 4, norm=_CHANNEL_NORM)
        self.first = nn.Sequential(*(ConvNeXtBlock(width) for _ in range(depths[0])))
        self.down = NormFirst(width, 2 * width, norm=_CHANNEL_NORM)
        self.second = nn.Sequential(*(ConvNeXtBlock(2 * width) for _ in range(depths[1])))
        self.out = nn.Conv2d(2 * width, dim, 2, 2)


class ChannelGate(nn.Module):
    """An MLP over the channels with two depth-wise convolutions inside, each channel then gated by the whole map.

        g_c = τ_h σ(Σ_n softmax_n(Wq x)_nc · mean_{c' of the head} softmax_n(x)_nc');   y = g ⊙ norm(mlp(x))
        mlp: h = W1 x;  W2 (h + s ⊙ dw(norm(gelu(dw(h)))))

    (B, H, W, C) to the same; the softmaxes are over places. Cost O(N C²).
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.local = nn.Sequential(
            DepthwiseConv(hidden, 3), nn.GELU(), nn.BatchNorm2d(hidden), DepthwiseConv(hidden, 3)
        )  # fmt: skip
        self.scale = nn.Parameter(torch.ones(hidden))
        self.norm = nn.LayerNorm(dim)  # the authors have two eps
        self.wq = nn.Linear(dim, dim)
        self.temperature = nn.Parameter(torch.ones(heads))

    def gate(self, x: Tensor) -> Tensor:
        """(B, C) of the map (B, H, W, C)."""
        x = x.flatten(1, 2)
        q = self.wq(x).softmax(1).unflatten(-1, (self.heads, -1))
        k = x.softmax(1).unflatten(-1, (self.heads, -1)).mean(-1, keepdim=True)
        return ((q * k).sum(1).sigmoid() * self.temperature[:, None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        h = h + self.scale * self.local(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(self.fc2(h)) * self.gate(x)[:, None, None]


class RobustClassBlock(nn.Module):
    """Class attention; unlike CaiT's, the other tokens (B, 1 + N, C) are normed into the residual path too."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.mixer = _LAYER_NORM(dim), ClassAttention(dim, heads=heads, bias=True)
        self.norm2, self.mlp = _LAYER_NORM(dim), MLP(dim, 4 * dim)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm1(x)
        token = self.mixer(seen[:, :1], seen[:, 1:])
        x = self.norm2(x + self.scale1 * torch.cat((token, seen[:, 1:]), 1))
        return x + torch.cat((self.scale2 * self.mlp(x[:, :1]), x[:, 1:]), 1)


@register(
    Card(
        name="fan",
        title="Robustifying Token Attention for Vision Transformers",
        paper="2303.11126",
        system="tap_adl",
        family="spatial",
        kind=BACKBONE,
        cost="N²",
        growth=2.0,
        sample={"dim": 16, "depth": 2, "heads": 2, "num_classes": 10},
        sizes=SIZES,
    )
)
class FAN(Pyramid):
    """FAN (arXiv 2204.12451): attention over places, then over channels, and class attention at the end; with `scales`
    token-aware pooling (arXiv 2303.11126) before the attention of every block.

        x = x + drop_path(γ₁ attention(norm1(tap(x))));   x = x + drop_path(γ₂ channel_gate(norm2(x)))

    Images (B, in_channels, H, W), any size, to logits (B, num_classes); one map, at 1/16. Cost per block:
    13NC² + 2N²C. In training add `recipes.robust_attention.diversity_loss` of its maps. `hub.load_official` reads the
    authors' checkpoints, of whose networks those with Swin's windows are not here. In their hybrid stem, norms over
    channels-last memory divide by C − 1; here, as over any other memory, by C.

    Args:
        stem_depths: blocks of each of the two ConvNeXt stages before the patches (the "hybrid" networks); None for
            four convolutions. scales: of the pooling; 0 for plain FAN. class_layers: blocks of class attention.
        drop_path: of every block alike.
    """

    def __init__(
        self,
        *,
        dim: int = 384,
        depth: int = 12,
        heads: int = 8,
        scales: int = 4,
        stem_depths: tuple[int, int] | None = None,
        mlp_ratio: float = 4.0,
        class_layers: int = 2,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
        **pyramid: Any,
    ) -> None:
        if class_layers < 1 or dim % 8:
            raise ValueError(f"class_layers must be at least 1 and dim a multiple of 8, got {class_layers} and {dim}")

        def block(_: Any) -> nn.Module:
            made = Block(
                dim,
                MultiHead(dim, heads=heads, bias=True, out_bias=True),
                layout="tokens",
                mlp=ChannelGate(dim, heads, int(dim * mlp_ratio)),
                norm=_LAYER_NORM,
                layer_scale=1.0,
            )
            made.drop_path = DropPath(drop_path)
            if scales:
                made.norm1 = PooledNorm(dim, scales, made.norm1)
            return made

        body = conv_stem(in_channels, dim) if stem_depths is None else HybridStem(in_channels, dim, stem_depths)
        super().__init__(
            dims=(dim,),
            depths=(depth,),
            strides=(16,),
            stem=nn.Sequential(body, FourierPositions(dim)),
            block=block,
            norm=_LAYER_NORM(dim),
            in_channels=in_channels,
            num_classes=num_classes,
            **pyramid,
        )
        self.class_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim), std=0.02))
        self.class_blocks = nn.ModuleList(RobustClassBlock(dim, heads) for _ in range(class_layers))
        self.apply(trunc_normal_linear)

    def forward_head(self, x: Tensor) -> Tensor:
        token = self.class_token.expand(len(x), 1, -1)
        x = torch.cat((token, x.permute(0, 2, 3, 1).flatten(1, 2)), 1)
        for block in self.class_blocks:
            x = block(x)
        x = x[:, 0]
        return self.head(self.dropout(x if self.norm is None else self.norm(x)))
