"""Finds attention computed by hand, which the tap cannot see: a softmax whose result multiplies a matrix."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SOFTMAX = {torch.softmax, F.softmax, Tensor.softmax}
_PRODUCT = {torch.matmul, torch.bmm, torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, torch.baddbmm}


class HandWritten:
    """Follows the results of softmax through dropout, casts and views to a product; `found` is the module of that."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.found: str | None = None
        self._weights: dict[int, weakref.ref[Tensor]] = {}

    def follow(self, func: Any, args: tuple[Any, ...], result: Any, name: str) -> None:
        if func in _SOFTMAX:
            if isinstance(result, Tensor) and result.dim() >= 3:
                self._weights[id(result)] = weakref.ref(result)
            return
        if not self._weights or self.found is not None:
            return
        for arg in args:
            alive = self._weights.get(id(arg))
            if alive is None or not isinstance(arg, Tensor) or alive() is not arg:
                continue
            if func in _PRODUCT:
                self.found = name
            elif isinstance(result, Tensor) and (func is Tensor.__getitem__ or result.numel() == arg.numel()):
                self._weights[id(result)] = weakref.ref(result)
            return


def complaint(model: nn.Module, name: str) -> str:
    """What is said of the module `name`, which computes attention by hand, with the one line that helps."""
    return (
        f"{name or type(model).__name__} computes its softmax by hand, out of the tap's sight: {_remedy(model, name)}"
    )


def _remedy(model: nn.Module, name: str) -> str:
    module = model.get_submodule(name)
    home = type(module).__module__.split(".")[0]
    if hasattr(module, "fused_attn"):
        before = "`timm.layers.set_fused_attn(True, experimental=True)` before the model is built"
        return f"set its `fused_attn = True` (timm: {before})"
    if home == "transformers":
        inner = [model, *(model.get_submodule(name[:i]) for i in range(len(name)) if name[i] == ".")]
        able = [m for m in inner if hasattr(m, "_supports_sdpa")]
        if able and not able[-1]._supports_sdpa:
            return (
                f"transformers has no other for {type(able[-1]).__name__}; let it call "
                "torch.nn.functional.scaled_dot_product_attention"
            )
        return 'call `model.set_attn_implementation("sdpa")`'
    if home == "diffusers":
        return "call `model.set_attn_processor(AttnProcessor2_0())`"
    return "let it call torch.nn.functional.scaled_dot_product_attention"
