"""ECA-MobileNetV2: inverted residuals that end in efficient channel attention."""

from __future__ import annotations

from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import ConvNorm, kaiming_conv
from attnlab.models.skeletons.pyramid import Place, Pyramid
from attnlab.nn.channel.eca import EfficientChannelAttention

# MobileNetV2 (arXiv 1801.04381), table 2: width, blocks, stride (the first is the stem's) and expansion per stage.
_DIMS = (16, 24, 32, 64, 96, 160, 320)
DEPTHS = (1, 2, 3, 4, 3, 3, 1)
_STRIDES = (2, 2, 2, 2, 1, 2, 1)
_EXPANSIONS = (1, 6, 6, 6, 6, 6, 6)


class InvertedResidual(nn.Module):
    """1×1 to `dim`·`expansion` channels, depth-wise 3×3, 1×1 back, then the gate; a shortcut where the shape stays."""

    def __init__(
        self, input_dim: int, dim: int, *, stride: int = 1, expansion: float = 6.0, kernel: int | None = None
    ) -> None:
        super().__init__()
        hidden = round(input_dim * expansion)
        expand = [ConvNorm(input_dim, hidden, 1, activation=nn.ReLU6(inplace=True))] if expansion != 1 else []
        self.convs = nn.Sequential(
            *expand,
            ConvNorm(hidden, hidden, 3, stride, groups=hidden, activation=nn.ReLU6(inplace=True)),
            ConvNorm(hidden, dim, 1),
        )
        self.gate = EfficientChannelAttention(dim, kernel=kernel)
        self.residual = stride == 1 and input_dim == dim

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(self.convs(x))
        return x + y if self.residual else y


@register(
    Card(
        name="eca_mobilenetv2",
        title="ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
        paper="1910.03151",
        system="eca",
        family="channel",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
        sample={"width": 0.25, "num_classes": 10},
        probe=(64, 32),
        sizes={"eca_mobilenetv2": Size(3_504_903)},
    )
)
class ECAMobileNetV2(Pyramid):
    """MobileNetV2 with efficient channel attention in every block: kernel 1 under 96 channels, else 3.

    Images `(B, in_channels, H, W)` to logits; `forward_features` gives the maps of its seven stages.
    Source: arXiv 1910.03151. `width` multiplies all channel counts (the last 1,280 only if it is over 1).
    """

    def __init__(
        self, *, width: float = 1.0, in_channels: int = 3, num_classes: int = 1000, dropout: float = 0.25
    ) -> None:
        def block(place: Place) -> nn.Module:
            return InvertedResidual(
                place.input_dim,
                place.dim,
                stride=place.stride,
                expansion=_EXPANSIONS[place.stage],
                kernel=1 if _DIMS[place.stage] < 96 else 3,
            )

        dims = [int(dim * width) for dim in _DIMS]
        stem_dim, last = int(32 * width), int(1280 * max(1.0, width))
        super().__init__(
            dims=dims,
            depths=DEPTHS,
            strides=_STRIDES,
            stem=ConvNorm(in_channels, stem_dim, 3, 2, activation=nn.ReLU6(inplace=True)),
            stem_dim=stem_dim,
            downsample=None,
            block=block,
            norm=ConvNorm(dims[-1], last, 1, activation=nn.ReLU6(inplace=True)),
            head_dim=last,
            in_channels=in_channels,
            num_classes=num_classes,
            dropout=dropout,
        )
        self.init_weights()

    def init_weights(self) -> None:
        self.apply(kaiming_conv)
        if isinstance(self.head, nn.Linear):
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)
