"""A linear layer and its activation in one pass over what they make, for inference on CPUs: `linear`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.nn.untouched import recorded, untouched

_WORTH = 1 << 16  # numbers made, from which on passes cost more than asking whether they may be spared
_TALL = 4  # times as many rows as columns, from which on they cost more than the weights' way into the kernel's order


def linear(x: Tensor, layer: nn.Module, activation: nn.Module | None = None) -> Tensor:
    """`activation(layer(x))`, `(…, C)` → `(…, C')`.

    Torch writes what a linear layer makes three times: the bias in each row, the products added to it, the activation.
    Where nothing is trained and nobody would notice (see `untouched`), oneDNN's kernel, which torch has for what it
    compiles, writes it once: a third faster where layers are narrow and maps are large.
    """
    modules = (layer,) if activation is None else (layer, activation)
    if torch.compiler.is_compiling() or type(layer) is not nn.Linear or recorded(x, layer.weight, layer.bias):
        return _then(activation, layer(x))  # before sizes are asked for, which a compiler would hold on to
    if _fused(x, layer.weight, layer.bias, activation) and untouched(x, *modules):
        return _pointwise(x, layer.weight, layer.bias, activation)
    y = layer(x)
    if type(activation) is nn.GELU and y.numel() >= _WORTH and untouched(x, *modules):
        return torch.ops.aten.gelu_(y, approximate=activation.approximate)  # at least no memory of its own
    return _then(activation, y)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: nn.Module | None = None) -> Tensor:
    """`activation(F.linear(x, weight, bias))`, in one pass where `linear` would be."""
    modules = () if activation is None else (activation,)
    if _fused(x, weight, bias, activation) and untouched(x, *modules):
        return _pointwise(x, weight, bias, activation)
    return _then(activation, F.linear(x, weight, bias))


def _then(activation: nn.Module | None, y: Tensor) -> Tensor:
    return y if activation is None else activation(y)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, activation: nn.Module | None = None) -> Tensor:
    name, form = _FORMS[type(activation)]
    form = activation.approximate if isinstance(activation, nn.GELU) else form
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], form)


# What the kernel calls an activation.
_FORMS = {type(None): ("none", ""), nn.GELU: ("gelu", ""), nn.ReLU: ("relu", ""), nn.SiLU: ("swish", "")}


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, activation: nn.Module | None = None) -> bool:
    """Whether the kernel is there, takes this, and nobody counts or records operators on their way."""
    return (
        not torch.compiler.is_compiling()
        and (rows := x.shape[:-1].numel()) * len(weight) >= _WORTH
        and rows >= _TALL * weight.shape[1]
        and type(activation) in _FORMS
        and x.dtype is torch.float32
        and weight.is_contiguous()  # for slices of columns it has no fast kernel
        and not recorded(x, weight, bias)
        and torch._C._get_mkldnn_enabled()
        and not torch._C._len_torch_dispatch_stack()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
