"""What computes attention: ours and its peers, each a function of q, k, v made for one mask and one length."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.attend import attend
from attnlab.patterns import Causal, Full, Neighborhood, Pattern
from attnlab.routing import Route

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


class Refusal(ValueError):
    """An operator cannot compute this, or is not installed; says why."""


def ours(pattern: Pattern, route: Route | None, length: int, device: str) -> Run:
    """attnlab's `attend`, whichever backend it chooses."""
    return partial(attend, pattern=pattern, route=route)


def sdpa(pattern: Pattern, route: Route | None, length: int, device: str) -> Run:
    """torch's own operator, with a boolean mask where it knows no better; the mask is made once, not timed."""
    if route is None and isinstance(pattern, Full):
        return F.scaled_dot_product_attention
    if route is None and isinstance(pattern, Causal):
        return partial(F.scaled_dot_product_attention, is_causal=True)
    shown: Any = pattern if route is None else route
    heads = shown.table.shape[1] if route is not None else 1
    if heads * length * length > 2**31:
        raise Refusal(f"a mask of {heads} × {length:,}² bytes")
    mask = shown.matrix(length, heads=heads, device=device)
    return partial(F.scaled_dot_product_attention, attn_mask=mask)


def flex(pattern: Pattern, route: Route | None, length: int, device: str) -> Run:
    """FlexAttention, compiled, with its block mask; compiling is not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shown: Any = pattern if route is None else route
    heads = shown.table.shape[1] if route is not None else None
    if isinstance(pattern, Full) and route is None:
        return _compiled(flex_attention)
    mask = create_block_mask(
        lambda b, h, q, k: shown.allows(b, h, q, k), None, heads if heads and heads > 1 else None, length, length,
        device=device,
    )  # fmt: skip
    return partial(_compiled(flex_attention), block_mask=mask)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False)


def natten(pattern: Pattern, route: Route | None, length: int, device: str) -> Run:
    """NATTEN's kernels, which know neighborhoods."""
    _need("natten")
    if route is not None or not isinstance(pattern, Neighborhood):
        raise Refusal("natten computes neighborhoods")

    import natten.functional as functional

    grid = pattern.grid
    kernel = getattr(functional, f"na{len(grid)}d")
    how = dict(kernel_size=pattern.kernel, dilation=pattern.dilation, stride=pattern.stride, is_causal=pattern.causal)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).unflatten(1, grid).contiguous() for x in (q, k, v))
        return kernel(q, k, v, **how).flatten(1, len(grid)).transpose(1, 2)

    return run


def x_transformers(pattern: Pattern, route: Route | None, length: int, device: str) -> Run:
    """x-transformers' `Attend`, by torch's fused operator."""
    _need("x_transformers")
    if route is not None or not isinstance(pattern, (Full, Causal)):
        raise Refusal("x-transformers' Attend is full or causal")
    from x_transformers.attend import Attend

    module = Attend(causal=isinstance(pattern, Causal), flash=True)
    return lambda q, k, v: module(q, k, v)[0]


def _need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Refusal(f"{module.replace('_', '-')} is not installed")


OURS = "attnlab"
OPERATORS: dict[str, Callable[[Pattern, Route | None, int, str], Run]] = {
    OURS: ours,
    "sdpa": sdpa,
    "flex": flex,
    "natten": natten,
    "x-transformers": x_transformers,
}


def chosen(peers: bool, names: tuple[str, ...] = ()) -> list[str]:
    """The operators asked for: ours, with its peers if they are wanted, or those named."""
    unknown = [name for name in names if name not in OPERATORS]
    if unknown:
        raise ValueError(f"operators: {', '.join(unknown)} unknown; there are {', '.join(OPERATORS)}")
    return list(names) or (list(OPERATORS) if peers else [OURS])
