"""Two linear layers and an activation between: `two_layers`, which on CPUs keeps a large hidden map in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.nn.fused import linear
from attnlab.nn.untouched import recorded, untouched

_WORTH = 1 << 23  # hidden numbers (32 MiB in float32) from which on fresh memory costs more than smaller products
_CACHED = 1 << 20  # hidden numbers for each thread at a time
_ROWS = 1024  # and at least so many rows, for the products' sake

Activation = Callable[[Tensor], Tensor]
Call = Any  # what torch hands to an autograd function; its type has no public name


def two_layers(x: Tensor, fc1: nn.Linear, activation: nn.Module, fc2: nn.Linear) -> Tensor:
    """`fc2(activation(fc1(x)))` over the last axis of any `(…, C)`; the activation works number by number.

    A hidden map of many rows costs a CPU more in fresh memory than in products. Where it is large it is therefore
    computed some rows at a time, which give their memory to the next; training keeps the map before the activation
    and computes the one behind it again. Equal to rounding, in first and higher gradients. Layers with hooks, of a
    class of their own, or under a transform (compilation, `torch.func`, autocast, …) are called as they are.
    """
    if torch.compiler.is_compiling():  # before sizes are asked for, which would be held on to
        return fc2(activation(fc1(x)))
    rows = x.numel() // max(x.shape[-1], 1)
    if rows * fc1.out_features < _WORTH or not _plain(x, fc1, activation, fc2):
        return linear(linear(x, fc1, activation), fc2)
    flat, weights = x.reshape(rows, -1), (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    if recorded(x, *weights):
        out = _TwoLayers.apply(flat, *weights, activation)[0]
    else:
        out = x.new_empty(rows, fc2.out_features)
        for part in _parts(rows, fc1.out_features):
            out[part] = linear(linear(flat[part], fc1, activation), fc2)
    return out.unflatten(0, x.shape[:-1])


def _plain(x: Tensor, fc1: nn.Module, activation: nn.Module, fc2: nn.Module) -> bool:
    """Whether nobody would notice: layers of torch's class, and an activation that leaves its input as it was."""
    if type(fc1) is not nn.Linear or type(fc2) is not nn.Linear or getattr(activation, "inplace", False):
        return False
    return untouched(x, fc1, activation, fc2)


def _parts(rows: int, hidden: int) -> Iterator[slice]:
    step = max(_ROWS, torch.get_num_threads() * _CACHED // hidden)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """A linear layer into `out`, memory of that shape, where it is given."""
    return torch.mm(x, weight.mT, out=out) if bias is None else torch.addmm(bias, x, weight.mT, out=out)


class _TwoLayers(torch.autograd.Function):
    """(rows, C) → (rows, C') and the hidden map before the activation, which is for the backward alone."""

    @staticmethod
    def forward(
        x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: Activation
    ) -> tuple[Tensor, Tensor]:
        inner, out = F.linear(x, w1, b1), x.new_empty(len(x), len(w2))
        for part in _parts(*inner.shape):
            _linear(activation(inner[part]), w2, b2, out[part])
        return out, inner

    @staticmethod
    def setup_context(ctx: Call, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.activation = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Call, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        *tensors, inner = ctx.saved_tensors
        needed = ctx.needs_input_grad[:5]
        if grad is None:
            return (None,) * 6
        if torch.is_grad_enabled():  # for gradients of gradients
            x, w1, b1, w2, b2 = tensors
            out = F.linear(ctx.activation(F.linear(x, w1, b1)), w2, b2)
            wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
            found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
            return *(next(found) if need else None for need in needed), None
        return *_gradients(tensors, inner, grad, needed, ctx.activation), None


def _gradients(
    tensors: list[Tensor], inner: Tensor, grad: Tensor, needed: tuple[bool, ...], activation: Activation
) -> list[Tensor | None]:
    x, w1, _, w2, _ = tensors
    dx, dw1, db1, dw2, db2 = (
        None if t is None or not need else torch.empty_like(t) if t is x else torch.zeros_like(t)
        for t, need in zip(tensors, needed, strict=True)
    )
    product = inner.new_empty(0)
    for part in _parts(*inner.shape):
        with torch.enable_grad():
            before = inner[part].detach().requires_grad_()
            after = activation(before)
        product = torch.mm(grad[part], w2, out=product[: len(before)] if len(product) else None)
        if dw2 is not None:
            dw2.addmm_(grad[part].mT, after.detach())
        if not any(needed[:3]):
            continue
        (hidden,) = torch.autograd.grad(after, before, product)
        if db1 is not None:
            db1 += hidden.sum(0)
        if dw1 is not None:
            dw1.addmm_(hidden.mT, x[part])
        if dx is not None:
            torch.mm(hidden, w1, out=dx[part])
    if db2 is not None:
        db2 = grad.sum(0)
    return [dx, dw1, db1, dw2, db2]
