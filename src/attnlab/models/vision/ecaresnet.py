"""ECA-ResNet: residual networks whose branches end in efficient channel attention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import ConvNorm, kaiming_conv
from attnlab.models.skeletons.pyramid import Place, Pyramid
from attnlab.nn.channel.eca import EfficientChannelAttention
from attnlab.nn.untouched import recorded, untouched


class ResidualBlock(nn.Module):
    """relu(gate(convs(x)) + shortcut(x)): the gate stands on the branch's output, behind its last batch norm.

    `bottleneck`: 1×1 to `dim`/4, 3×3 (with the stride), 1×1 to `dim`; otherwise 3×3 (with the stride), 3×3.
    The shortcut is a 1×1 convolution where the shape changes, or where `project` asks for it.
    """

    def __init__(
        self,
        input_dim: int,
        dim: int,
        *,
        stride: int = 1,
        kernel: int | None = None,
        bottleneck: bool = False,
        project: bool = False,
    ) -> None:
        super().__init__()

        def relu() -> nn.Module:
            return nn.ReLU(inplace=True)

        if bottleneck:
            hidden = dim // 4
            self.convs = nn.Sequential(
                ConvNorm(input_dim, hidden, 1, activation=relu()),
                ConvNorm(hidden, hidden, 3, stride, activation=relu()),
                ConvNorm(hidden, dim, 1),
            )
        else:
            self.convs = nn.Sequential(ConvNorm(input_dim, dim, 3, stride, activation=relu()), ConvNorm(dim, dim, 3))
        self.gate = EfficientChannelAttention(dim, kernel=kernel)
        changes = project or stride != 1 or input_dim != dim
        self.shortcut = ConvNorm(input_dim, dim, 1, stride) if changes else nn.Identity()
        self.act = relu()

    def forward(self, x: Tensor) -> Tensor:
        y, shortcut = self.gate(self.convs(x)), self.shortcut(x)
        # In the gate's own memory where nobody has kept what it gave.
        own = type(self.gate) is EfficientChannelAttention and not recorded(y, shortcut) and untouched(y, self.gate)
        return self.act(y.add_(shortcut) if own else y + shortcut)


def _size(params: int, depths: tuple[int, ...], kernels: tuple[int, ...], bottleneck: bool) -> Size:
    return Size(params, {"depths": depths, "kernels": kernels, "bottleneck": bottleneck})


# Parameters with 1,000 classes, and the kernels of the released checkpoints. The paper's closed form (kernels=None)
# gives 5, 5, 5, 7 for the bottleneck widths: 86 weights in a ResNet-50 instead of 80.
SIZES = {
    "eca_resnet18": _size(11_689_556, (2, 2, 2, 2), (3, 5, 7, 7), False),
    "eca_resnet34": _size(21_797_744, (3, 4, 6, 3), (3, 3, 5, 7), False),
    "eca_resnet50": _size(25_557_112, (3, 4, 6, 3), (3, 5, 5, 7), True),
    "eca_resnet101": _size(44_549_317, (3, 4, 23, 3), (3, 3, 5, 7), True),
    "eca_resnet152": _size(60_193_042, (3, 8, 36, 3), (3, 3, 5, 7), True),
}


@register(
    Card(
        name="eca_resnet",
        title="ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
        paper="1910.03151",
        system="eca",
        family="channel",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
        sample={"depths": (1, 1, 1, 1), "dim": 8, "num_classes": 10},
        probe=(64, 32),
        sizes=SIZES,
    )
)
class ECAResNet(Pyramid):
    """ResNet-18 to 152 with efficient channel attention in every block: a few dozen weights over the plain network.

    Images `(B, in_channels, H, W)` to logits; `forward_features` gives the map of each stage. Source: arXiv 1910.03151.
    The authors trained with SGD (momentum 0.9, weight decay 1e-4, batch 256, rate 0.1, a tenth every 30 of 100 epochs).

    Args:
        dim: width of the stem; stage i has dim·2ⁱ channels, four times as many with `bottleneck`.
        kernels: of the attention, one per stage; None for the paper's closed form of each width.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 4, 6, 3),
        kernels: Sequence[int] | None = None,
        bottleneck: bool = True,
        dim: int = 64,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        if kernels is not None and len(kernels) != len(depths):
            raise ValueError(f"kernels needs one entry per stage ({len(depths)}), got {len(kernels)}")

        def block(place: Place) -> nn.Module:
            return ResidualBlock(
                place.input_dim,
                place.dim,
                stride=place.stride,
                kernel=None if kernels is None else kernels[place.stage],
                bottleneck=bottleneck,
            )

        stem = ConvNorm(in_channels, dim, 7, 2, activation=nn.ReLU(inplace=True))
        stem.add_module("pool", nn.MaxPool2d(3, 2, 1))
        super().__init__(
            dims=[dim * 2**stage * (4 if bottleneck else 1) for stage in range(len(depths))],
            depths=depths,
            strides=(4, *(2,) * (len(depths) - 1)),
            stem=stem,
            stem_dim=dim,
            downsample=None,
            block=block,
            in_channels=in_channels,
            num_classes=num_classes,
        )
        self.init_weights()

    def init_weights(self) -> None:
        self.apply(kaiming_conv)
