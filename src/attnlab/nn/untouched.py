"""Whether a module may take a shortcut past its parts: only where nobody would see that it did."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

_PLAIN = (Tensor, nn.Parameter)
_LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d, nn.GELU, nn.Identity)


def untouched(x: Tensor, *layers: nn.Module) -> bool:
    """True where plain tensors on a CPU go through torch's own layers, without hooks, adapters or transforms.

    Not under compilation, tracing, `torch.func`, forward-mode gradients or autocast, and not where a layer is of a
    class of its own (a low-rank adapter, a quantised layer) or its parameters are: those must be called as they are.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if type(x) is not Tensor or x.device.type != "cpu" or x.is_sparse or torch.is_autocast_enabled("cpu"):
        return False
    if torch.autograd.forward_ad._current_level >= 0 or _has_any_global_hook():
        return False
    return all(
        type(layer) in _LAYERS
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and all(
            type(t) in _PLAIN and t.dtype == x.dtype
            for t in chain(layer.parameters(False), layer.buffers(False))
            if t.is_floating_point()
        )
        for layer in layers
    )


def recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd will want to come back through these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
