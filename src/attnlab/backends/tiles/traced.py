"""Tile attention as one operator of a graph: what torch.compile and torch.export put in place of the tiles.

A graph holds tensors, numbers and words, so the pattern is told in words and numbers (`tell`) and read back when the
graph runs (`read`); its plan is then made and kept as ever. Grids may change from call to call.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import attnlab.patterns as patterns
from attnlab.backends.tiles.kernel import Call
from attnlab.backends.tiles.plan import tiling
from attnlab.patterns import Pattern

_KINDS: dict[str, type[Pattern]] = {name: getattr(patterns, name) for name in patterns.__all__ if name != "Pattern"}


def tellable(value: Any) -> bool:
    """Whether `tell` can say all there is to a pattern: a pattern of tensors, or of a user's own class, it cannot."""
    if isinstance(value, Pattern):
        known = type(value).__name__ in _KINDS
        return known and all(tellable(getattr(value, name)) for name in value.__dataclass_fields__)
    if isinstance(value, tuple):
        return all(tellable(x) for x in value)
    return value is None or isinstance(value, (bool, int))


def tell(value: Any, words: list[str], numbers: list[int]) -> None:
    """Append a pattern to `words` and `numbers`: its class, then its fields in order."""
    if isinstance(value, Pattern):
        words.append(type(value).__name__)
        for name in value.__dataclass_fields__:
            tell(getattr(value, name), words, numbers)
    elif isinstance(value, tuple):
        words.append(f"*{len(value)}")
        for x in value:
            tell(x, words, numbers)
    elif value is None or isinstance(value, bool):
        words.append(str(value))
    else:
        words.append("#")
        numbers.append(value)


@lru_cache(maxsize=256)
def read(words: str, numbers: tuple[int, ...]) -> Pattern:
    """The pattern that `tell` told."""
    return _read(iter(words.split()), iter(numbers))


def _read(words: Iterator[str], numbers: Iterator[int]) -> Any:
    word = next(words)
    if word in _KINDS:
        kind = _KINDS[word]
        return kind(*[_read(words, numbers) for _ in kind.__dataclass_fields__])
    if word.startswith("*"):
        return tuple(_read(words, numbers) for _ in range(int(word[1:])))
    return next(numbers) if word == "#" else {"None": None, "True": True, "False": False}[word]


def traced_attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float) -> tuple[Tensor, Tensor]:
    """`tile_attention` under `pattern`, for a tracer to see as one operator."""
    words: list[str] = []
    numbers: list[int] = []
    tell(pattern, words, numbers)
    return _attention(q, k, v, " ".join(words), numbers, scale)


@torch.library.custom_op("attnlab::tile_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, words: str, numbers: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    call = _call(q, k, v, words, numbers, scale)
    out, lse = call.forward(call.arrange(q), k, v)
    return _by_token(call.restore(out)[..., : v.shape[-1]]), _by_token(call.restore(lse))[..., 0]


@torch.library.custom_op("attnlab::tile_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    words: str, numbers: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = _call(q, k, v, words, numbers, scale)
    lses = [call.arrange(x.unsqueeze(-1), 1) for x in (grad_lse, lse)]
    some = lses[0] if bool(grad_lse.any()) else None
    grads = call.backward(call.arrange(grad), some, call.arrange(q), k, v, call.arrange(out), lses[1])
    return tuple(_by_token(x) for x in grads)  # type: ignore[return-value]


def _call(q: Tensor, k: Tensor, v: Tensor, words: str, numbers: list[int], scale: float) -> Call:
    plan = tiling(read(words, tuple(numbers)), q.shape[2], k.shape[2], q.device)
    return Call(q, k, v, plan, scale, None)


def _by_token(x: Tensor) -> Tensor:
    """The layout that the compiler is told of: heads lie next to each other."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _like(x: Tensor, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], heads, width, dtype=dtype).transpose(1, 2)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, words: str, numbers: list[int], scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    return _like(q, q.shape[1], v.shape[-1], q.dtype), _like(q, q.shape[1], 1, wide)[..., 0]


@_backward.register_fake
def _(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    words: str, numbers: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(_like(x, x.shape[1], x.shape[-1], x.dtype) for x in (q, k, v))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.words, ctx.numbers, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> Any:
    q, k, v, out, lse = ctx.saved_tensors
    return (*_backward(grad, grad_lse, q, k, v, out, lse, ctx.words, ctx.numbers, ctx.scale), None, None, None)


_attention.register_autograd(_differentiate, setup_context=_keep)
