"""Terminator: five blocks of slow and fast networks at full resolution, without residual paths or attention."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import BACKBONE, Card, Size, register
from attnlab.nn.spatial.hyperzzw import SlowFast, standardize

# Parameters, as the authors' code has.
SIZES = {
    "terminator_cifar10": Size(1_336_855, {"num_classes": 10}),
    "terminator_cifar100": Size(1_362_865, {"num_classes": 100}),
}
BEFORE = (0, 0, 1, 1, 2)  # earlier maps that each block takes
Evaluation = Literal["running", "batch"]


class GroupStandardize(nn.Module):
    """Groups of channels standardised in turn over batch and places, and over each sample's places: `(B, C, H, W)`."""

    def __init__(self, dim: int, *, groups: int = 12, running: bool = True) -> None:
        super().__init__()
        if groups < 2 or dim % groups:
            raise ValueError(f"dim must be a multiple of groups = {groups}, got {dim}")
        self.width = dim // groups
        self.norm = nn.BatchNorm2d((groups + 1) // 2 * self.width, affine=False, track_running_stats=running)

    def forward(self, x: Tensor) -> Tensor:
        groups = list(x.split(self.width, 1))
        groups[::2] = self.norm(torch.cat(groups[::2], 1)).split(self.width, 1)
        groups[1::2] = standardize(torch.cat(groups[1::2], 1)).split(self.width, 1)
        return torch.cat(groups, 1)


class SlowFastBlock(nn.Module):
    """dropout(gelu(group_standardize(layer(x, …))) + b), `(B, C, size, size)` to `(B, factor·C, size, size)`."""

    def __init__(self, layer: SlowFast, *, dropout: float = 0.0, running: bool = True) -> None:
        super().__init__()
        self.layer = layer
        self.norm = GroupStandardize(layer.bottleneck.out_channels, running=running)
        self.bias = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor, *earlier: Tensor) -> Tensor:
        return self.dropout(F.gelu(self.norm(self.layer(x, *earlier))) + self.bias)


@register(
    Card(
        name="terminator",
        title="HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction",
        paper="2401.17948",
        system="terminator",
        family="spatial",
        kind=BACKBONE,
        cost="N^1.5",
        sample={
            "image": 8, "factors": (4, 1, 1, 1, 1), "slow": (4, 4, 4, 4, 4), "slow_layers": (2, 1, 1, 1, 1),
            "local": 4, "channel": 4, "interaction": (3, 4), "kernels": (3, 5, 3, 5), "omega": 1.0,
        },
        probe=(8, 8),
        sizes=SIZES,
    )
)  # fmt: skip
class Terminator(nn.Module):
    """A small image network whose weights depend on context everywhere, for images of the one size it was built for.

        five `SlowFastBlock`s, each widening its map by a factor; the third and later ones also see earlier maps
        logits = head(mean over places)

    Images `(B, in_channels, image, image)` to logits `(B, num_classes)`; `forward_features` gives the map behind each
    block, all at full resolution. Train it with `attnlab.recipes.terminator`: the loss between `slow_kernels`, its
    regulariser, and its sign optimiser. Source: arXiv 2401.17948 (hyperevolnet/Terminator).

    Args:
        evaluation: "running": what depends on the batch (standardisation, the context of local kernels) is, when
            evaluated, as it was on average in training, so that a picture's class does not depend on the others.
            "batch": the batch's own, as in the authors' code, with whose checkpoints it goes. Training is the same.
        factors: of each block's output channels to its input channels; outputs must be multiples of 12.
        slow, slow_layers: hidden width and layers of each block's global slow net. local, channel, interaction: hidden
            widths of the others, interaction's for channels and for places. kernels: of the local branches.
        omega: frequency at which slow nets begin.
    """

    def __init__(
        self,
        *,
        image: int = 32,
        factors: Sequence[int] = (4, 3, 2, 2, 2),
        slow: Sequence[int] = (64, 64, 64, 64, 64),
        slow_layers: Sequence[int] = (3, 2, 2, 2, 2),
        local: int = 32,
        channel: int = 32,
        interaction: tuple[int, int] = (16, 64),
        kernels: Sequence[int] = (3, 9, 5, 7),
        dropout: Sequence[float] = (0.0, 0.05, 0.05, 0.05, 0.05),
        omega: float = 2000.0,
        evaluation: Evaluation = "running",
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if evaluation not in ("running", "batch"):
            raise ValueError(f"evaluation must be 'running' or 'batch', got {evaluation!r}")
        for name, given in (("factors", factors), ("slow", slow), ("slow_layers", slow_layers), ("dropout", dropout)):
            if len(given) != len(BEFORE):
                raise ValueError(f"{name} must be {len(BEFORE)}, one per block, got {len(given)}")
        self.image, self.in_channels, self.factors = image, in_channels, tuple(factors)
        self.channels = tuple(accumulate(factors, mul, initial=in_channels))[1:]
        self.reductions = (1,) * len(BEFORE)
        running = evaluation == "running"
        self.blocks = nn.ModuleList()
        for i, (dim, before) in enumerate(zip((in_channels, *self.channels), BEFORE, strict=False)):
            layer = SlowFast(
                dim,
                image,
                factor=factors[i],
                before=before,
                kernels=kernels,
                slow=(slow[i], slow_layers[i]),
                local=(local, 2),
                channel=(channel, 2),
                interaction=(*interaction, 2),
                omega=omega,
                running=running,
            )
            self.blocks.append(SlowFastBlock(layer, dropout=dropout[i], running=running))
        self.head = nn.Linear(self.channels[-1], num_classes) if num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear):
            nn.init.kaiming_normal_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def slow_kernels(self) -> list[Tensor]:
        """The global kernel of each block, `(C, image, image)`: no input has a say in it."""
        return [cast(SlowFastBlock, block).layer.slow() for block in self.blocks]

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The map behind each block, `(B, channels[i], image, image)`."""
        if x.ndim != 4 or x.shape[1:] != (self.in_channels, self.image, self.image):
            wanted = f"(B, {self.in_channels}, {self.image}, {self.image})"
            raise ValueError(f"x must be images {wanted}: kernels are as large as the map, got {tuple(x.shape)}")
        first, second, third, fourth, fifth = self.blocks
        y0 = first(x)
        y1 = second(y0)
        y2 = third(y1, y0)
        y3 = fourth(y2, y1)
        return [y0, y1, y2, y3, fifth(y3, y2, y1)]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x)[-1].mean((2, 3)))
