"""FLOPs of the named backbones, counted once and kept in `flops.json`: `python -m attnlab.models.flops` writes it anew.

A test counts some again, so that the file cannot grow stale.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from attnlab import cards
from attnlab.cost import count_flops

_FILE = Path(__file__).with_suffix(".json")
_IMAGES = (224, 256, 320, 384, 448, 512, 576, 640)


@dataclass(frozen=True)
class Counted:
    """FLOPs (two per multiply-add) of one image of `size` pixels, (H, W)."""

    flops: int
    size: tuple[int, int]


@cache
def counted() -> dict[str, Counted]:
    """Every named size of every backbone."""
    return {name: Counted(flops, (size[0], size[1])) for name, (flops, size) in json.loads(_FILE.read_text()).items()}


def count(name: str) -> Counted:
    """Builds the backbone `name` and counts: at the image size that it is made for, 224² or the next that it takes."""
    made = cards.describe(name).sizes[name]
    default = inspect.signature(cards.target(name)).parameters.get("image")
    image: Any = made.image or made.arguments.get("image", default.default if default else None)
    torch.manual_seed(0)
    network = cards.build(name).eval().requires_grad_(False)
    channels = getattr(network, "in_channels", 3)
    for size in _IMAGES if image is None else (image,):
        height, width = (size, size) if isinstance(size, int) else size
        try:
            return Counted(count_flops(network, torch.randn(1, channels, height, width)), (height, width))
        except ValueError as error:  # windows that do not tile the map
            reason = error
    raise ValueError(f"{name} takes no image of {_IMAGES}: {reason}")


def named_backbones() -> list[str]:
    return [name for entry in cards.entries() if entry.card.kind is cards.BACKBONE for name in entry.card.sizes]


def main() -> None:
    known = {name: (c.flops, c.size) for name, c in counted().items()} if _FILE.exists() else {}
    found = {}
    for name in named_backbones():
        if name in known:
            found[name] = known[name]
            continue
        one = count(name)
        found[name] = (one.flops, one.size)
        _write(found)
        print(f"{name}: {one.flops / 1e9:.2f} GFLOPs at {one.size[0]}×{one.size[1]}", flush=True)
    _write(found)


def _write(found: dict[str, tuple[int, tuple[int, int]]]) -> None:
    lines = ",\n".join(f' "{name}": {json.dumps(value)}' for name, value in found.items())
    _FILE.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
