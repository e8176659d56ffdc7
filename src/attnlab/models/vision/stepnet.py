"""StepNet: residual networks whose blocks choose their step sizes, of ImageNet's and of CIFAR's shape."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import ConvNorm, kaiming_conv
from attnlab.models.skeletons.pyramid import Place, Pyramid
from attnlab.models.vision.ecaresnet import ResidualBlock
from attnlab.nn.channel.step_size import StepSize


class SteppingBlock(ResidualBlock):
    """relu(x' + F ∘ f), f the convolutions of x and x' its shortcut; without a `step`, a plain residual block."""

    def __init__(self, input_dim: int, dim: int, *, step: StepSize | None, **convs: Any) -> None:
        super().__init__(input_dim, dim, **convs)
        self.gate = nn.Identity()  # type: ignore[assignment]
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        f, x = self.convs(x), self.shortcut(x)
        return self.act(x + f if self.step is None else x + self.step(x, f) * f)


def _size(params: int, depths: tuple[int, ...], bottleneck: bool, small: bool) -> Size:
    dim, classes = (16, 10) if small else (64, 1000)
    arguments = {"depths": depths, "bottleneck": bottleneck, "small": small, "dim": dim, "num_classes": classes}
    return Size(params, arguments, image=32 if small else 224)


# Parameters of this construction: 10 classes for the networks of CIFAR, 1,000 for those of ImageNet.
SIZES = {
    "stepnet83_cifar": _size(1_067_854, (9, 9, 9), True, True),
    "stepnet164_cifar": _size(2_100_802, (18, 18, 18), True, True),
    "stepnet34": _size(22_116_524, (3, 4, 6, 3), False, False),
    "stepnet50": _size(30_604_856, (3, 4, 6, 3), True, False),
    "stepnet101": _size(54_074_104, (3, 4, 23, 3), True, False),
}


@register(
    Card(
        name="stepnet",
        title="Understanding Self-attention Mechanism via Dynamical System Perspective",
        paper="2308.09939",
        family="channel",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
        sample={"depths": (1, 2), "dim": 8, "num_classes": 10, "small": True},
        sizes=SIZES,
    )
)
class StepNet(Pyramid):
    """A residual network read as an ODE's solver, whose steps are learned: channel attention on every branch.

    Images (B, in_channels, H, W) → logits; `forward_features` gives the map of each stage. After the idea of arXiv
    2308.09939 (see `StepSize`). `recipes.stiffness` measures where such a network is stiff, and so where steps matter:
    `StepNet(at=stiffest(neural_stiffness(trained, images), 3))` has them there alone.

    Args:
        small: CIFAR's stem, a 3×3 convolution that keeps the size, in place of ImageNet's.
        attention: "step", "se" (squeeze-and-excite: a step of f alone) or "none".
        at: the blocks that have it, counted from the first; all of them if None.
        step: further arguments of each `StepSize`.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 4, 6, 3),
        bottleneck: bool = True,
        dim: int = 64,
        small: bool = False,
        attention: Literal["step", "se", "none"] = "step",
        at: Collection[int] | None = None,
        step: dict[str, Any] | None = None,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        if attention not in ("step", "se", "none"):
            raise ValueError(f"attention must be 'step', 'se' or 'none', got {attention!r}")
        wanted = range(sum(depths)) if at is None else at
        if any(not 0 <= i < sum(depths) for i in wanted):
            raise ValueError(f"at must hold blocks from 0 to {sum(depths) - 1}, got {sorted(wanted)}")
        options = {**({"features": ("f",)} if attention == "se" else {}), **(step or {})}

        def block(place: Place) -> nn.Module:
            here = attention != "none" and sum(depths[: place.stage]) + place.index in wanted
            return SteppingBlock(
                place.input_dim,
                place.dim,
                step=StepSize(place.dim, **options) if here else None,
                stride=place.stride,
                bottleneck=bottleneck,
            )

        stem = ConvNorm(in_channels, dim, 3 if small else 7, 1 if small else 2, activation=nn.ReLU(inplace=True))
        if not small:
            stem.add_module("pool", nn.MaxPool2d(3, 2, 1))
        super().__init__(
            dims=[dim * 2**stage * (4 if bottleneck else 1) for stage in range(len(depths))],
            depths=depths,
            strides=(1 if small else 4, *(2,) * (len(depths) - 1)),
            stem=stem,
            stem_dim=dim,
            downsample=None,
            block=block,
            in_channels=in_channels,
            num_classes=num_classes,
        )
        self.apply(kaiming_conv)
