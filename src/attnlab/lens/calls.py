"""From each function that computes attention to the event that it is, and back to what its caller expects."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.lens.event import Event
from attnlab.nn.decode import attend_one
from attnlab.scan import scan
from attnlab.weightings import SOFTMAX, Weighting
from attnlab.weightings import weighting as as_weighting

Handle = Callable[[Event], Tensor]


class Frame(NamedTuple):
    """A module whose forward is running, and what it was called with."""

    name: str
    module: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


def scaled_dot_product(
    handle: Handle, frame: Frame, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.scaled_dot_product_attention`: heads with any axes, or none, before (H, N, D)."""

    def native() -> Tensor:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
            enable_gqa=enable_gqa,
        )  # fmt: skip
        return _four(out).reshape(*q.shape[:-1], -1)

    q, k, v = _four(query), _four(key), _four(value)
    mask = attn_mask
    if _packed(frame, q, k):
        q = q.flatten(1, 2).unsqueeze(2)
        if mask is not None and mask.dim() == 4 and mask.shape[2] > 1:
            mask = mask.flatten(1, 2).unsqueeze(2)
    if mask is not None and query.dim() > 4:
        mask = _four(mask.expand(*query.shape[:-3], *mask.shape[-3:])) if mask.dim() > 3 else mask
    repeated = _repeated(frame.module, q, k)
    event = Event(
        frame.name, frame.module, "sdpa", kind_of(frame, q, k), q, k[:, ::repeated], v[:, ::repeated],
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale), mask=mask, is_causal=is_causal,
        dropout=dropout_p, native=native,
    )  # fmt: skip
    out = handle(event)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _four(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x[None] if x.dim() == 3 else x[None, None] if x.dim() == 2 else x.flatten(0, -4)


def _repeated(module: nn.Module, q: Tensor, k: Tensor) -> int:
    """How often the model has repeated each key head for the sake of the kernel (transformers' `repeat_kv`)."""
    groups = getattr(module, "num_key_value_groups", 1)
    return (
        groups
        if isinstance(groups, int) and groups > 1 and q.shape[1] == k.shape[1] and q.shape[1] % groups == 0
        else 1
    )


def _packed(frame: Frame, q: Tensor, k: Tensor) -> bool:
    """Whether transformers passed the heads of one query that share a key head as that many queries (`pack_gqa`)."""
    own = frame.arguments[0] if frame.arguments else frame.keywords.get("hidden_states")
    if not isinstance(own, Tensor) or own.dim() != 3 or own.shape[1] != 1:
        return False
    groups = getattr(frame.module, "num_key_value_groups", 1)
    return groups != 1 and q.shape[1:3] == (k.shape[1], groups)


# Names under which modules take what a cross attention looks at, and a cache.
_CONTEXTS = ("encoder_hidden_states", "context", "key_value_states", "cross_attention_states", "memory")
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache", "state")


def kind_of(frame: Frame, q: Tensor, k: Tensor) -> str:
    """Whether a module looks at its own tokens ("self") or at others' ("cross")."""
    said = getattr(frame.module, "is_cross_attention", None)
    if isinstance(said, bool):
        return "cross" if said else "self"
    if isinstance(frame.module, nn.MultiheadAttention):
        query, key = [*frame.arguments, *(frame.keywords.get(n) for n in ("query", "key"))][:2]
        return "self" if query is key else "cross"
    own = frame.arguments[0] if frame.arguments else frame.keywords.get("hidden_states", frame.keywords.get("x"))
    named = [frame.keywords.get(name) for name in _CONTEXTS]
    if "context" in _parameters(type(frame.module)):
        named += frame.arguments[1:2]
    others = [other for other in named if isinstance(other, Tensor) and other is not own]
    if others:
        # Where both are one sequence (the joint attention of diffusion transformers), it looks at itself.
        both = sum(x.shape[-2] for x in (own, *others) if isinstance(x, Tensor) and x.dim() > 2)
        return "self" if q.shape[-2] == k.shape[-2] == both else "cross"
    if q.shape[-2] == k.shape[-2] or any(frame.keywords.get(name) is not None for name in _CACHES):
        return "self"
    return "cross"


def _parameters(kind: type[nn.Module]) -> Sequence[str]:
    """The second parameter of a module's forward, by name."""
    try:
        return list(inspect.signature(kind.forward).parameters)[2:3]
    except (TypeError, ValueError):
        return ()


def multi_head(handle: Handle, frame: Frame, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """`torch.nn.functional.multi_head_attention_forward`: projections by torch, the attention within as an event."""
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.apply_defaults()
    wanted, averaged = bound.arguments["need_weights"], bound.arguments["average_attn_weights"]
    bound.arguments["need_weights"] = False
    weights: list[Tensor] = []

    def within(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, p: float = 0.0, causal: bool = False
    ) -> Tensor:
        def native() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, mask, p, causal)

        event = Event(
            frame.name, frame.module, "multi_head_attention_forward", kind_of(frame, q, k), q, k, v,
            scale=q.shape[-1] ** -0.5, mask=mask, is_causal=causal, dropout=p, native=native,
        )  # fmt: skip
        out = handle(event)
        if wanted:
            weights.append(event.weights())
        return out

    # The function asks whether it is overridden, and would come back here for ever. A copy of it that does not ask,
    # and that calls `within` where it calls the kernel, is torch's own code of whichever version is installed.
    function = F.multi_head_attention_forward
    names = {**vars(F), "has_torch_function": lambda _: False, "scaled_dot_product_attention": within}
    plain = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    out, _ = plain(*bound.args, **bound.kwargs)
    if not wanted:
        return out, None
    seen = weights[0].mean(1) if averaged else weights[0]
    return out, seen.to(out.dtype) if out.dim() == 3 and bound.arguments["query"].dim() == 3 else seen[0].to(out.dtype)


def attended(
    handle: Handle, frame: Frame, q: Tensor, k: Tensor, v: Tensor, *, pattern: Any = None, route: Any = None,
    weighting: Any = None, bias: Any = None, scale: float | None = None, dropout: float = 0.0,
    return_lse: bool = False, backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """attnlab's own `attend`."""
    how: Any = dict(
        pattern=pattern, route=route, weighting=weighting, bias=bias, scale=scale, dropout=dropout,
        return_lse=return_lse, backend=backend,
    )  # fmt: skip
    if not all(isinstance(x, Tensor) and x.dim() == 4 for x in (q, k, v)):
        return attend(q, k, v, **how)  # which says what is wrong
    kept: list[Tensor] = []

    def native() -> Tensor:
        result = attend(q, k, v, **how)
        if not isinstance(result, tuple):
            return result
        kept.append(result[1])
        return result[0]

    event = Event(
        frame.name, frame.module, "attend", kind_of(frame, q, k), q, k, v,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale), pattern=pattern, route=route, bias=bias,
        weighting=as_weighting(weighting), dropout=dropout, native=native,
    )  # fmt: skip
    out = handle(event)
    if not return_lse:
        return out
    return out, kept[0] if kept else event.scores().logsumexp(-1) if event.lse is None else event.lse


def attended_one(
    handle: Handle, frame: Frame, parts: Sequence[tuple[Tensor, Tensor, Tensor]], *, scale: float | None = None,
    weighting: Weighting = SOFTMAX, bias: Any = None, at: Tensor | None = None, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """A step of decoding over stretches of a cache, joined into one call."""

    def native() -> Tensor:
        return attend_one(parts, scale=scale, weighting=weighting, bias=bias, at=at, dropout=dropout)

    q, k, v = parts[0]
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if len(parts) > 1:
        # The query is turned differently for each stretch: side by side, each beside zeros for the others' keys.
        q = torch.cat([part[0] for part in parts], -1)
        k = torch.cat([
            F.pad(part[1], (i * part[1].shape[-1], (len(parts) - 1 - i) * part[1].shape[-1]))
            for i, part in enumerate(parts)
        ], 2)  # fmt: skip
        v = torch.cat([part[2] for part in parts], 2)
    if bias is not None and at is not None:
        looked_up = bias
        bias = looked_up[..., at] if isinstance(looked_up, Tensor) else lambda b, h, i, j: looked_up(b, h, i, at[j])
    event = Event(
        frame.name, frame.module, "attend", "self", q, k, v, scale=scale, bias=bias, weighting=weighting,
        dropout=dropout, native=native,
    )  # fmt: skip
    return handle(event)


def scanned(
    handle: Handle, frame: Frame, q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor | None = None,
    beta: Tensor | None = None, scale: float | None = None, state: Tensor | None = None, **how: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """attnlab's own `scan`. The state goes on as it was: edits reach what is read from it."""
    last: list[Tensor] = []

    def native() -> Tensor:
        out, after = scan(q, k, v, decay=decay, beta=beta, scale=scale, state=state, **how)
        last.append(after)
        return out

    if how.get("cu_seqlens") is not None:
        return scan(q, k, v, decay=decay, beta=beta, scale=scale, state=state, **how)
    event = Event(
        frame.name, frame.module, "scan", "self", q, k, v, scale=1.0 if scale is None else float(scale), decay=decay,
        beta=beta, state=state, native=native,
    )  # fmt: skip
    out = handle(event)
    if event.last is not None:
        last.append(event.last)
    if not last:
        last.append(
            scan(event.q, event.k, event.v, decay=event.decay, beta=event.beta, scale=event.scale, state=state)[1]
        )
    return out, last[0]
