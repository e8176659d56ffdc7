"""Tile attention as one operator of a graph: what torch.compile and torch.export put in place of the tiles.

A graph holds tensors, numbers and words, so a pattern (and the rows of a looked-up bias) is told in words and numbers
(`tell`) and read back when the graph runs (`read`); its plan is then made and kept as ever. Grids may change from call
to call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnlab.backends.tiles.kernel import Call
from attnlab.backends.tiles.plan import tiling
from attnlab.patterns import Pattern
from attnlab.problem import Lookup

_CONSTANTS = {"None": None, "True": True, "False": False}


def tellable(value: Any) -> bool:
    """Whether `tell` can say all there is to a value: dataclasses, tuples and numbers it can, tensors it cannot."""
    if value is None or isinstance(value, (bool, int)):
        return True
    if isinstance(value, tuple):
        return all(tellable(x) for x in value)
    if not hasattr(value, "__dataclass_fields__") or "<locals>" in type(value).__qualname__:
        return False
    return all(tellable(getattr(value, name)) for name in value.__dataclass_fields__)


def tell(value: Any, words: list[str], numbers: list[int]) -> None:
    """Append a value to `words` and `numbers`: of a dataclass, its class and then its fields in order."""
    if value is None or isinstance(value, bool):
        words.append(str(value))
    elif isinstance(value, int):
        words.append("#")
        numbers.append(value)
    elif isinstance(value, tuple):
        words.append(f"*{len(value)}")
        for x in value:
            tell(x, words, numbers)
    else:
        words.append(f"{type(value).__module__}:{type(value).__qualname__}")
        for name in value.__dataclass_fields__:
            tell(getattr(value, name), words, numbers)


@lru_cache(maxsize=256)
def read(words: str, numbers: tuple[int, ...]) -> Any:
    """The value that `tell` told. Its classes must be imported already: a graph cannot make anything be imported."""
    return _read(iter(words.split()), iter(numbers))


def _read(words: Iterator[str], numbers: Iterator[int]) -> Any:
    word = next(words)
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    if word == "#":
        return next(numbers)
    if word.startswith("*"):
        return tuple(_read(words, numbers) for _ in range(int(word[1:])))
    module, _, name = word.partition(":")
    kind = getattr(sys.modules.get(module), name, None)
    if not hasattr(kind, "__dataclass_fields__"):
        raise ValueError(f"the graph needs {name} of {module}: import it before the graph runs")
    return kind(*[_read(words, numbers) for _ in kind.__dataclass_fields__])  # type: ignore[misc, union-attr]


def traced_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float, bias: Lookup | None = None
) -> tuple[Tensor, Tensor]:
    """`tile_attention` under `pattern`, for a tracer to see as one operator."""
    words: list[str] = []
    numbers: list[int] = []
    tell((pattern, None if bias is None else bias.row), words, numbers)
    return _attention(q, k, v, None if bias is None else bias.table, " ".join(words), numbers, scale)


@torch.library.custom_op("attnlab::tile_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, words: str, numbers: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    call = _call(q, k, v, table, words, numbers, scale)
    out, lse = call.forward(call.arrange(q), k, v)
    return _by_token(call.restore(out)[..., : v.shape[-1]]), _by_token(call.restore(lse))[..., 0]


@torch.library.custom_op("attnlab::tile_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    table: Tensor | None, words: str, numbers: list[int], scale: float, trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, and of the table if it is `trained` (else an empty tensor)."""
    call = _call(q, k, v, table, words, numbers, scale)
    grad_lse, lse = (call.arrange(x.unsqueeze(-1), 1) for x in (grad_lse, lse))
    some = grad_lse if bool(grad_lse.any()) else None
    grads = call.backward(call.arrange(grad), some, call.arrange(q), k, v, call.arrange(out), lse, table=trained)
    grad_q, grad_k, grad_v = (_by_token(x) for x in grads)
    if table is None or call.looked is None or not trained:
        return grad_q, grad_k, grad_v, q.new_empty(0)
    return grad_q, grad_k, grad_v, call.looked.gradient().to(table.dtype).contiguous()


def _call(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, words: str, numbers: list[int], scale: float) -> Call:
    pattern, row = read(words, tuple(numbers))
    bias = None if table is None else Lookup(table, row)
    call = Call(q, k, v, tiling(pattern, q.shape[2], k.shape[2], q.device), scale, bias)
    call.look_up()
    return call


def _by_token(x: Tensor) -> Tensor:
    """The layout that the compiler is told of: heads lie next to each other."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _like(x: Tensor, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], heads, width, dtype=dtype).transpose(1, 2)


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, words: str, numbers: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    return _like(q, q.shape[1], v.shape[-1], q.dtype), _like(q, q.shape[1], 1, wide)[..., 0]


@_backward.register_fake
def _(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    table: Tensor | None, words: str, numbers: list[int], scale: float, trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_q, grad_k, grad_v = (_like(x, x.shape[1], x.shape[-1], x.dtype) for x in (q, k, v))
    return grad_q, grad_k, grad_v, q.new_empty(0) if table is None or not trained else table.new_empty(table.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, table, ctx.words, ctx.numbers, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, table)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> Any:
    *saved, table = ctx.saved_tensors
    trained = table is not None and ctx.needs_input_grad[3]
    grads = _backward(grad, grad_lse, *saved, table, ctx.words, ctx.numbers, ctx.scale, trained)
    return (*grads[:3], grads[3] if trained else None, None, None, None)


_attention.register_autograd(_differentiate, setup_context=_keep)
