"""A backbone without its head, for detectors and segmenters: images to maps at several scales."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from attnlab import cards
from attnlab.models.skeletons.pyramid import Pyramid


class Features(nn.Module):
    """Images (B, in_channels, H, W) → maps [(B, channels[i], ~H/reductions[i], ~W/reductions[i]), …].

    What `attnlab.build(name, features_only=True)` gives. The network's state_dict lies under `network.`.

    Args:
        network: a backbone with `forward_features`, `channels` and `reductions`.
        out_indices: which of its maps; all of them if None, and negative ones count from the last.
    """

    def __init__(self, network: nn.Module, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        for name in ("forward_features", "channels", "reductions"):
            if not hasattr(network, name):
                raise TypeError(f"network must be a backbone with {name}, {type(network).__name__} has none")
        channels: Sequence[int] = network.channels  # type: ignore[assignment]
        count = len(channels)
        chosen = range(count) if out_indices is None else out_indices
        if not len(chosen) or not all(-count <= i < count for i in chosen):
            raise ValueError(f"out_indices must name some of the {count} maps, got {tuple(chosen)}")
        if isinstance(network, Pyramid):
            network.norm = None  # it serves the head alone
        self.network, self.out_indices = network, tuple(i % count for i in chosen)
        self.channels = tuple(channels[i] for i in self.out_indices)
        self.reductions: tuple[int, ...] = tuple(network.reductions[i] for i in self.out_indices)  # type: ignore

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.network.forward_features(x)  # type: ignore[operator]
        return [maps[i] for i in self.out_indices]


def features_of(name: str, out_indices: Sequence[int] | None, arguments: Mapping[str, Any]) -> Features:
    """The registered backbone `name` as `Features`."""
    kind, target = cards.describe(name).kind, cards.target(name)
    if kind is not cards.BACKBONE:
        raise ValueError(f"features_only is for backbones, {name!r} is of kind {kind.value!r}")
    headless = {"num_classes": 0} if "num_classes" in inspect.signature(target).parameters else {}
    return Features(cards.build(name, **{**headless, **arguments}), out_indices)
