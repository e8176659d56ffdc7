"""HorFPN: a feature pyramid for detectors and segmenters whose last convolutions are recursive and gated."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import OPERATOR, Card, register
from attnlab.nn.spatial.gated_conv import RecursiveGatedConv

_SOURCES = ("input", "lateral", "output")


@register(
    Card(
        name="horfpn",
        title="HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions",
        paper="2207.14284",
        family="spatial",
        kind=OPERATOR,
        cost="N",
        sample={"channels": (8, 16)},
    )
)
class HorFPN(nn.Module):
    """Maps of a backbone, fine to coarse, to as many or more maps of one width that know of the coarser ones.

        l_i = Wᵢ x_i + up(l_{i+1});   y_i = gnconv(l_i)      up: the nearest place;  gnconv instead of FPN's 3×3

    A list of `(B, channels[i], Hᵢ, Wᵢ)`, any sizes, → `levels` maps `(B, dim, Hᵢ, Wᵢ)`; those beyond the backbone's
    halve the last one. Use it behind `attnlab.build(name, features_only=True)`, whose `channels` it wants.
    Cost O(N): at most N·dim·(3.5·dim + 1.5·kernel²) a map at order 2, where FPN's convolution costs 9N·dim².
    Source: arXiv 2207.14284 (raoyongming/HorNet, "GNFPN").

    Args:
        levels: of the output; as many as there are maps if None.
        extra: where further levels come from: None is every other place of the last output; else a strided 3×3
            convolution and a gnconv, of the backbone's last map ("input"), the last l ("lateral") or the last y
            ("output").
        order, kernel, spectrum: of `RecursiveGatedConv`, whose scale is 1 here; the paper's neck of global filters has
            spectrum (32, 17).
        relu: before further levels but the first.
    """

    def __init__(
        self,
        channels: Sequence[int],
        dim: int = 256,
        *,
        levels: int | None = None,
        extra: str | None = None,
        order: int = 2,
        kernel: int = 7,
        spectrum: tuple[int, int] | None = None,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.levels = tuple(channels), len(channels) if levels is None else levels
        if not self.channels or self.levels < len(self.channels):
            raise ValueError(f"levels must be at least the {len(self.channels)} maps, of which one, got {self.levels}")
        if extra is not None and extra not in _SOURCES:
            raise ValueError(f"extra must be None or one of {', '.join(_SOURCES)}, got {extra!r}")
        self.extra, self.relu = extra, relu

        def gated() -> RecursiveGatedConv:
            return RecursiveGatedConv(dim, order=order, scale=1.0, kernel=kernel, spectrum=spectrum)

        self.lateral = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in self.channels)
        self.mix = nn.ModuleList(gated() for _ in self.channels)
        further = self.levels - len(self.channels) if extra else 0
        first = self.channels[-1] if extra == "input" else dim
        self.down = nn.ModuleList(nn.Conv2d(dim if i else first, dim, 3, 2, 1) for i in range(further))
        self.mix_down = nn.ModuleList(gated() for _ in range(further))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        given = [tuple(x.shape) for x in maps]
        if [s[1] if len(s) == 4 else 0 for s in given] != list(self.channels):
            raise ValueError(f"maps must be {len(self.channels)} (B, C, H, W) with C of {self.channels}, got {given}")
        lateral = [layer(x) for layer, x in zip(self.lateral, maps, strict=True)]
        for i in range(len(lateral) - 1, 0, -1):
            lateral[i - 1] = lateral[i - 1] + F.interpolate(lateral[i], lateral[i - 1].shape[2:])
        found = [mix(x) for mix, x in zip(self.mix, lateral, strict=True)]
        source = {"input": maps[-1], "lateral": lateral[-1]}.get(self.extra or "", found[-1])
        for i, (down, mix) in enumerate(zip(self.down, self.mix_down, strict=True)):
            source = mix(down(source.relu() if self.relu and i else source))
            found.append(source)
        while len(found) < self.levels:
            found.append(found[-1][..., ::2, ::2])
        return found
