"""Whether a module may take a shortcut past its parts: only where nobody would see that it did."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

_TENSORS = (Tensor, nn.Parameter)


def untouched(x: Tensor, *modules: nn.Module) -> bool:
    """True where plain tensors on a CPU go through modules without hooks, whose own parameters are plain too.

    Not under compilation, tracing, `torch.func`, forward-mode gradients or autocast. Whoever asks must know the classes
    of the modules: a linear layer of another class (an adapter, a quantised one) has to be called as it is.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if type(x) is not Tensor or x.device.type != "cpu" or x.is_sparse or torch.is_autocast_enabled("cpu"):
        return False
    if torch.autograd.forward_ad._current_level >= 0 or _has_any_global_hook() or torch._C._len_torch_function_stack():
        return False
    return not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules
    ) and all(
        type(t) in _TENSORS and (t.dtype == x.dtype or not t.is_floating_point())
        for m in modules
        for t in chain(m._parameters.values(), m._buffers.values())
        if t is not None
    )


def recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd will want to come back through these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
