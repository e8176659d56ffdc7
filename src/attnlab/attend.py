"""The operator of everything with a pairwise score: check the problem, plan, run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from attnlab.merging import merge
from attnlab.patterns import Causal, Full, Pattern
from attnlab.problem import Bias, Lookup, Problem
from attnlab.weightings import SOFTMAX, Affine, Weighting
from attnlab.weightings import weighting as as_weighting

if TYPE_CHECKING:
    from attnlab.planner import Explanation
    from attnlab.routing import Route

__all__ = ["attend", "explain", "merge", "pose"]

_FULL = Full()
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern | None = None, route: Route | None = None,
    weighting: Weighting | str | None = None, bias: Bias | None = None, scale: float | None = None,
    dropout: float = 0.0, return_lse: Literal[False] = False, backend: str = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern | None = None, route: Route | None = None,
    weighting: Weighting | str | None = None, bias: Bias | None = None, scale: float | None = None,
    dropout: float = 0.0, return_lse: Literal[True], backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | None = None,
    route: Route | None = None,
    weighting: Weighting | str | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over whatever keys the pattern or route allows, by the fastest backend that can.

        out_i = Σ_j w(s_ij) v_j        s_ij = scale · q_i·k_j + bias_ij        j allowed for i

    Args:
        q, k, v: `(B, H, Nq, D)`, `(B, Hkv, Nk, D)`, `(B, Hkv, Nk, Dv)`; Hkv divides H, and key head j serves the query
            heads j·H/Hkv onwards. One dtype (float64, 32, 16 or bfloat16) and one device.
        pattern: where each query may look; None is everywhere.
        route: chooses where from the content (`attnlab.routing`); narrows `pattern`.
        weighting: softmax if None; an object or name from `attnlab.weightings`.
        bias: a tensor broadcastable to `(B, H, Nq, Nk)`, or a function `f(b, h, q, k)` of index tensors.
        scale: D^-½ if None.
        dropout: probability with which a weight is dropped (always applied: pass 0 when not training).
        return_lse: also return `(B, H, Nq)`, the natural log of the softmax denominator (−inf where no key is seen);
            differentiable. `merge` joins parts over disjoint keys by it.
        backend: "auto", or a name from `explain`.

    Returns:
        `(B, H, Nq, Dv)`. A query that may see no key gives zeros and zero gradients.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is wanted.
    """
    # As torch's own functions do, so that a TorchFunctionMode sees the call as what it is.
    if has_torch_function((q, k, v)):
        itself: Any = attend
        return handle_torch_function(
            itself, (q, k, v), q, k, v, pattern=pattern, route=route, weighting=weighting, bias=bias, scale=scale,
            dropout=dropout, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    # The plain and the plainly causal case go straight to torch: a planner's microseconds show on small inputs.
    # What is not well formed goes on to `pose`, which says why.
    if (
        (pattern is None or type(pattern) is Causal)
        and backend == "auto"
        and bias is None
        and route is None
        and weighting is None
        and not (return_lse or dropout)
        and (scale is None or isinstance(scale, float))
        and isinstance(q, Tensor)
        and isinstance(k, Tensor)
        and isinstance(v, Tensor)
        and q.shape == k.shape == v.shape
        and q.dim() == 4
        and q.dtype is k.dtype is v.dtype
        and q.device == k.device == v.device
        and q.dtype in _DTYPES
        and q.numel()
    ):
        return F.scaled_dot_product_attention(q, k, v, is_causal=pattern is not None, scale=scale)
    from attnlab import planner

    if isinstance(q, Tensor) and not q.is_meta and torch.is_autocast_enabled(q.device.type):
        return _under_autocast(
            q, k, v, pattern=pattern, route=route, weighting=weighting, bias=bias, scale=scale, dropout=dropout,
            return_lse=return_lse, backend=backend,
        )  # fmt: skip
    problem = pose(
        q, k, v, pattern=pattern, route=route, weighting=weighting, bias=bias, scale=scale, dropout=dropout,
        return_lse=return_lse,
    )  # fmt: skip
    if isinstance(problem.weighting, Affine):
        return _affine(problem, problem.weighting, q, k, v, backend)
    out, lse = planner.run(problem, q, k, v, backend)
    return (out, lse) if lse is not None and return_lse else out


def _under_autocast(*heads: Tensor, **keywords: Any) -> Tensor | tuple[Tensor, Tensor]:
    """`attend` as torch's own attention behaves there: in the dtype of the autocast, whatever norms made of q and k."""
    kind = heads[0].device.type
    low = torch.get_autocast_dtype(kind)
    cast = [
        x.to(low) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype is not torch.float64 else x
        for x in heads
    ]
    with torch.autocast(kind, enabled=False):
        return attend(*cast, **keywords)


def _affine(problem: Problem, how: Affine, q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Softmax attention and the mean of what is seen, which is the attention of a query without any preference."""
    from attnlab import planner

    softmax = replace(problem, weighting=SOFTMAX)
    taken, _ = planner.run(softmax, q, k, v, backend)
    even = replace(softmax, bias=None, trained_bias=False, dropout=0.0)
    mean, _ = planner.run(even, torch.zeros_like(q), k, v, backend)
    return how.factor * taken + (how.total - how.factor) * mean


def pose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | None = None,
    route: Route | None = None,
    weighting: Weighting | str | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
) -> Problem:
    """Check the arguments of `attend` and put them into a `Problem`."""
    from attnlab import planner

    _check_tensors(q, k, v)
    batch, heads, nq, dim = q.shape
    kv_heads, nk, value_dim = k.shape[1], k.shape[2], v.shape[3]
    pattern = _FULL if pattern is None else pattern
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a Pattern, got {type(pattern).__name__} (wrap a mask: Explicit(mask))")
    pattern.check(nq, nk)
    if route is not None:
        if not hasattr(route, "select"):
            raise TypeError(f"route must be a Route, got {type(route).__name__}")
        routed = route.select(q, k)
        pattern = routed if isinstance(pattern, Full) else routed & pattern
    how = as_weighting(weighting)
    if return_lse and not how.normalised:
        raise ValueError(f"return_lse needs a normalised weighting such as softmax, got {how}")
    if not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be a number in [0, 1), got {dropout!r}")
    if isinstance(scale, Tensor):
        raise TypeError("scale must be a number, got a tensor (multiply q by it)")
    trained_bias = bias is not None and _check_bias(bias, q, (batch, heads, nq, nk))
    trained = trained_bias or q.requires_grad or k.requires_grad or v.requires_grad
    traced = torch.compiler.is_compiling()
    return Problem(
        batch=batch, heads=heads, kv_heads=kv_heads, nq=nq, nk=nk, dim=dim, value_dim=value_dim,
        dtype=q.dtype, device=q.device, pattern=pattern, weighting=how, bias=bias,
        scale=dim**-0.5 if scale is None else float(scale), dropout=float(dropout), return_lse=return_lse,
        needs_grad=trained and torch.is_grad_enabled(), trained_bias=trained_bias and torch.is_grad_enabled(),
        traced=traced, may_compile=traced or planner.may_compile(q.device), routed=route is not None,
    )  # fmt: skip


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x, wanted in (("q", q, "(B, H, Nq, D)"), ("k", k, "(B, Hkv, Nk, D)"), ("v", v, "(B, Hkv, Nk, Dv)")):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(x.shape)}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {x.dtype}")
        if 0 in x.shape:
            raise ValueError(f"{name} must not be empty, got {tuple(x.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must have q's batch size {q.shape[0]}, got {x.shape[0]}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must agree in batch, heads and length, got {tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have q's head dimension {q.shape[3]}, got {k.shape[3]}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k's heads must divide q's heads, got {k.shape[1]} and {q.shape[1]}")


def _check_bias(bias: Bias, q: Tensor, wanted: tuple[int, ...]) -> bool:
    """Raise unless `bias` fits; whether it is to be trained."""
    if isinstance(bias, Tensor):
        values = bias
    elif isinstance(bias, Lookup):
        values, wanted = bias.table, (*bias.table.shape[:-1], q.shape[1])
        if values.dim() != 2 or values.shape[1] != q.shape[1]:
            raise ValueError(f"bias's table must have shape (rows, H = {q.shape[1]}), got {tuple(values.shape)}")
    elif callable(bias):
        # One pair of the function shows what it returns, and whether a gradient flows into it.
        zero = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=q.device)
        values, wanted = bias(zero, zero, zero, zero), (1, 1, 1, 1)
        if not isinstance(values, Tensor):
            raise TypeError(f"bias must return a tensor, got {type(values).__name__}")
    else:
        raise TypeError(f"bias must be a tensor or a function of indices, got {type(bias).__name__}")
    fits = values.dim() <= 4 and all(b in (1, w) for b, w in zip(values.shape[::-1], wanted[::-1], strict=False))
    if not fits:
        raise ValueError(f"bias must be broadcastable to (B, H, Nq, Nk) = {wanted}, got {tuple(values.shape)}")
    if values.device != q.device:
        raise ValueError(f"bias must be on q's device {q.device}, got {values.device}")
    if not values.is_floating_point():
        raise TypeError(f"bias must be floating point, got {values.dtype} (wrap a mask: pattern=Explicit(mask))")
    return values.requires_grad


def explain(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Explanation:
    """Which backends could run this call of `attend`, at what predicted cost, and which one would: print it."""
    from attnlab import planner

    return planner.explain(pose(q, k, v, **keywords))
