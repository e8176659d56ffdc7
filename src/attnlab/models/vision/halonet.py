"""HaloNet: residual networks with halo attention in the place of their 3×3 convolutions, or of some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from attnlab.cards import BACKBONE, Card, Size, register
from attnlab.models.skeletons.mbconv import SqueezeExcite
from attnlab.models.skeletons.parts import ConvNorm, DropPath, kaiming_conv
from attnlab.models.skeletons.pyramid import Place, Pyramid
from attnlab.nn.spatial.halo import HaloAttention

Activation = Callable[..., nn.Module]


def multiple_of_8(width: float) -> int:
    """The nearest multiple of 8, never a tenth less than `width`."""
    near = max(8, int(width + 4) // 8 * 8)
    return near + 8 if near < 0.9 * width else near


class Bottleneck(nn.Module):
    """act(out(mix(narrow(x))) + shortcut(x)), where `mix` is halo attention or a 3×3 convolution.

    The shortcut is a 1×1 convolution where the shape changes; or, with `project=False`, there is none in such a block.
    `values` is the width of attention's values over `hidden`; `linear` leaves out the last activation.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        hidden: int,
        *,
        attention: dict[str, Any] | None,
        values: float = 1.0,
        stride: int = 1,
        groups: int = 1,
        squeeze: float = 0.0,
        activation: Activation = nn.ReLU,
        linear: bool = False,
        project: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.narrow = ConvNorm(dim, hidden, 1, activation=activation(inplace=True))
        if attention is None:
            self.mix: nn.Module = ConvNorm(
                hidden, hidden, 3, stride, groups=groups, activation=activation(inplace=True)
            )
            self.gate: nn.Module = nn.Identity()
            if squeeze:
                self.gate = SqueezeExcite(hidden, multiple_of_8(hidden * squeeze), activation=nn.ReLU)
        else:
            wide = int(hidden * values)
            mixer = HaloAttention(hidden, stride=stride, out_dim=wide, **attention)
            self.mix = nn.Sequential(mixer, nn.BatchNorm2d(wide), activation(inplace=True))
            self.gate = nn.Identity()
        self.out = ConvNorm(hidden if attention is None else wide, out_dim, 1)
        self.shortcut: nn.Module | None = nn.Identity()
        if stride != 1 or dim != out_dim:
            self.shortcut = ConvNorm(dim, out_dim, 1, stride) if project else None
        self.drop_path = DropPath(drop_path)
        self.act = nn.Identity() if linear else activation(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop_path(self.out(self.gate(self.mix(self.narrow(x)))))
        return self.act(y if self.shortcut is None else y + self.shortcut(x))


def tiered_stem(in_channels: int, dim: int, activation: Activation, pool: bool) -> nn.Sequential:
    """Three 3×3 convolutions of growing width, a quarter of the size."""
    widths = (in_channels, 3 * dim // 8, dim // 2, dim)
    strides = (2, 1, 1 if pool else 2)
    stem = nn.Sequential()
    for i in range(3):
        stem.add_module(
            f"conv{i + 1}", ConvNorm(widths[i], widths[i + 1], 3, strides[i], activation=activation(inplace=True))
        )
    if pool:
        stem.add_module("pool", nn.MaxPool2d(3, 2, 1))
    return stem


def _paper(
    params: int, block: int, halo: int, values: float, expand: float, depth: int, final: int = 0, **rest: Any
) -> Size:
    """A row of the paper's table: rv is `values`, rb `expand`, the widening at the end of each block."""
    dims = tuple(int(64 * 2**stage * expand) for stage in range(4))
    arguments = {"dims": dims, "ratio": 1 / expand, "depths": (3, 3, depth, 3), "block": block, "halo": halo}
    return Size(params, {**arguments, "values": values, "final": final, **rest})


def _hybrid(params: int, depths: tuple[int, ...], attends: tuple[str, ...], **rest: Any) -> Size:
    arguments = {"dims": (256, 512, 1024, 2048), "ratio": 0.25, "stem": "tiered", "attends": attends, "depths": depths}
    return Size(params, {**arguments, **rest})


_HEADS = (4, 8, 8, 8)

# Parameters with 1,000 classes. The paper's table: 5.5, 8.1, 9.4, 12.3, 19.1, 30.7, 43.4 and 67.4 million for H0 to
# H7 (the width of H3's last convolution is chosen to meet it); timm has the rest, and H1, whose eight heads it takes.
# Which blocks of a stage attend: one letter each, a for attention, c for convolution.
SIZES = {
    "halonet_h0": _paper(5_502_248, 8, 3, 1.0, 0.5, 7, heads=_HEADS),
    "halonet_h1": _paper(8_100_056, 8, 3, 1.0, 1.0, 10),
    "halonet_h2": _paper(9_405_608, 8, 3, 1.0, 1.25, 11, heads=_HEADS),
    "halonet_h3": _paper(12_295_912, 10, 3, 1.0, 1.5, 12, 1280, heads=_HEADS),
    "halonet_h4": _paper(19_103_464, 12, 2, 1.0, 3.0, 12, 1280, heads=_HEADS),
    "halonet_h5": _paper(30_718_952, 14, 2, 2.5, 2.0, 23, 1536, heads=_HEADS),
    "halonet_h6": _paper(43_458_280, 8, 4, 3.0, 2.75, 24, 1536, heads=_HEADS),
    "halonet_h7": _paper(67_434_728, 10, 3, 4.0, 3.5, 26, 2048, heads=_HEADS),
    "halonet26t": _hybrid(12_480_288, (2, 2, 2, 2), ("cc", "cc", "ca", "aa"), halo=2),
    "halonet50ts": _hybrid(
        22_733_280, (3, 4, 6, 3), ("ccc", "ccca", "cacaca", "cac"), heads=(8, 4, 8, 8), activation=nn.SiLU
    ),
    "sehalonet33ts": _hybrid(
        13_691_712, (2, 3, 3, 2), ("cc", "cca", "cca", "aa"), dims=(256, 512, 1024, 1536),
        ratio=(0.25, 0.25, 0.25, 0.333), pool=False, activation=nn.SiLU, squeeze=1 / 16, final=1280,
    ),
    "haloregnetz_b": Size(
        11_680_072,
        {
            "dims": (48, 96, 192, 288), "depths": (2, 6, 12, 2), "attends": ("cc", "cccccc", "cccacccaccca", "aa"),
            "block": 7, "halo": 2, "key_ratio": 0.33, "ratio": 3.0, "inverted": True, "group": 16, "stem": "small",
            "stem_dim": 32, "activation": nn.SiLU, "squeeze": 0.25, "final": 1536,
        },
    ),
}  # fmt: skip


@register(
    Card(
        name="halonet",
        title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        paper="2103.12731",
        system="halonet",
        family="spatial",
        kind=BACKBONE,
        cost="N (b + 2h)²",
        growth=1.0,
        sample={
            "dims": (16, 32), "depths": (1, 1), "heads": 2, "block": 4, "halo": 1, "stem_dim": 8, "num_classes": 10,
        },
        probe=(64, 32),
        sizes=SIZES,
    )
)  # fmt: skip
class HaloNet(Pyramid):
    """A residual network whose 3×3 convolutions are halo attention: H0 to H7 of the paper, and timm's hybrids.

    Images `(B, in_channels, H, W)` to logits `(B, num_classes)`; `forward_features` gives the map of each stage. Each
    map that is attended on, also before the first block of a stage shrinks it, must be a whole number of blocks high
    and wide: multiples of 256 pixels for `halonet_h1`, of 32·7 = 224 for `haloregnetz_b`. Sources: arXiv 2103.12731 for
    H0 to H7, and timm's `byoanet` for the sizes that mix attention with convolutions and put it where maps are small
    (t: tiered stem, s: SiLU, se: squeeze and excite).

    The paper trains with 350 epochs, SGD, label smoothing, RandAugment, stochastic depth.

    Args:
        dims: width after each stage's blocks; inside a block it is `ratio` times that (of its input's, if `inverted`).
        attends: for each stage a word with a letter per block, "a" for attention, "c" for a 3×3 convolution; None for
            attention everywhere. heads, ratio: one number or one per stage.
        values, key_ratio: width of values, and of queries and keys, over the block's inner width.
        squeeze: width of squeeze-and-excite behind convolutions over theirs, 0 for none.
        group: channels per group of the convolutions, 0 for dense ones.
        inverted: wide inside, linear at the end, no shortcut where the shape changes, and a stem of one convolution
            before a first stage that shrinks the map (RegNetZ).
        final: channels of a 1×1 convolution before the head, 0 for none.
        stem: "7x7" with max-pooling, "tiered" (with `pool` or a last stride), or "small", one 3×3 convolution.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 3, 10, 3),
        attends: Sequence[str] | None = None,
        heads: int | Sequence[int] = 8,
        block: int = 8,
        halo: int = 3,
        ratio: float | Sequence[float] = 1.0,
        values: float = 1.0,
        key_ratio: float | None = None,
        inverted: bool = False,
        group: int = 0,
        squeeze: float = 0.0,
        stem: str = "7x7",
        stem_dim: int = 64,
        pool: bool = True,
        final: int = 0,
        activation: Activation = nn.ReLU,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        stages = len(dims)
        attends = ["a" * depth for depth in depths] if attends is None else attends
        if [len(word) for word in attends] != list(depths) or set("".join(attends)) - set("ac"):
            raise ValueError(f"attends needs a word of a's and c's per stage, as long as depths, got {tuple(attends)}")
        per_stage = [[value] * stages if isinstance(value, (int, float)) else list(value) for value in (heads, ratio)]
        if any(len(values) != stages for values in per_stage):
            raise ValueError(f"heads and ratio must be one number or one per stage ({stages})")

        def build(place: Place) -> nn.Module:
            # The stem of an inverted network leaves a part of its reduction to the first block.
            first = inverted and place.stage == place.index == 0
            hidden = multiple_of_8((place.input_dim if inverted else place.dim) * per_stage[1][place.stage])
            attention: dict[str, Any] | None = None
            if attends[place.stage][place.index] == "a":
                count = per_stage[0][place.stage]
                keys = (multiple_of_8(hidden * key_ratio) if key_ratio else hidden) // count
                attention = {"heads": count, "block": block, "halo": halo, "head_dim": keys}
            return Bottleneck(
                place.input_dim,
                place.dim,
                hidden,
                attention=attention,
                values=values,
                stride=2 if first else place.stride,
                groups=hidden // group if group else 1,
                squeeze=squeeze,
                activation=activation,
                linear=inverted,
                project=not inverted,
                drop_path=place.drop_path,
            )

        stems: dict[str, Callable[[], nn.Module]] = {
            "7x7": lambda: ConvNorm(in_channels, stem_dim, 7, 2, activation=activation(inplace=True)),
            "tiered": lambda: tiered_stem(in_channels, stem_dim, activation, pool),
            "small": lambda: ConvNorm(in_channels, stem_dim, 3, 2, activation=activation(inplace=True)),
        }
        if stem not in stems or (stem == "small") != inverted:
            raise ValueError(f'stem must be "7x7" or "tiered", or "small" with inverted=True, got {stem!r}')
        entry = stems[stem]()
        if stem == "7x7":
            entry.add_module("pool", nn.MaxPool2d(3, 2, 1))
        super().__init__(
            dims=dims,
            depths=depths,
            strides=(4, *(2,) * (stages - 1)),
            stem=entry,
            stem_dim=stem_dim,
            downsample=None,
            block=build,
            norm=ConvNorm(dims[-1], final, 1, activation=activation(inplace=True)) if final else None,
            head_dim=final or None,
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
        )
        self.init_weights()

    def init_weights(self) -> None:
        self.apply(kaiming_conv)
        for module in self.modules():
            if isinstance(module, Bottleneck) and module.shortcut is not None:
                nn.init.zeros_(module.out.norm.weight)
