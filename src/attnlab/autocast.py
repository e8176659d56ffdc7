"""Where numbers must stay as exact as they are: `autocast_off`."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_off(x: Tensor) -> torch.autocast:
    """A context in which torch does not lower the precision of products on `x`'s device.

    On the meta device, which has shapes and no numbers, there is nothing to lower.
    """
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)
