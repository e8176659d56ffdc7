"""torchvision beside a build of torch that it was not made for: importable, without its compiled operators."""

from __future__ import annotations

import importlib
import sys
from typing import Any

_kept: list[Any] = []  # declarations go with the object that made them


def declare() -> None:
    """Let timm and transformers import torchvision, where it is installed and its operators do not load.

    Two declarations without operators are enough for the import. Where a plain import works, or there is none to
    import, nothing is done.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:
        import torch

        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _kept.append(library)
