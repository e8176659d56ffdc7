"""What the authors' checkouts import that is not to be had, or is for GPUs only: stand-ins while they are imported."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor


def absent_package(*_: Any) -> None:
    raise ModuleNotFoundError("no package is asked for")


def shim(name: str, **names: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(names)
    return module


def neighbors_times_values(weights: Tensor, values: Tensor, kernel_size: int, **_: Any) -> Tensor:
    """NATTEN's `na2d_av`, which it has no longer: `(B, h, H, W, k²)`, `(B, h, H, W, D)` → `(B, h, H, W, D)`."""
    batch, heads, height, width = values.shape[:4]
    near = torch.arange(kernel_size)
    rows = (torch.arange(height) - kernel_size // 2).clamp(0, height - kernel_size)[:, None] + near
    columns = (torch.arange(width) - kernel_size // 2).clamp(0, width - kernel_size)[:, None] + near
    places = (rows[:, None, :, None] * width + columns[None, :, None, :]).reshape(height * width, -1)
    dense = weights.new_zeros(batch, heads, height * width, height * width)
    dense = dense.scatter(-1, places.expand(batch, heads, -1, -1), weights.flatten(2, 3))
    return (dense @ values.flatten(2, 3)).view(values.shape)


SHIMS = {
    "causal_conv1d": shim("causal_conv1d", causal_conv1d_fn=None, causal_conv1d_update=None),
    "natten": shim("natten"),
    "natten.functional": shim("natten.functional", na2d_av=neighbors_times_values),
    "pkg_resources": shim(
        "pkg_resources", get_distribution=absent_package, DistributionNotFound=ModuleNotFoundError,
        parse_version=tuple,
    ),
}  # fmt: skip
