"""attnlab as an attention implementation of transformers: `attn_implementation="attnlab"`, a pattern in the config."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from attnlab.hub.host import Host, Rows, padded, tensor_host
from attnlab.hub.placed import Asked
from attnlab.hub.spelling import Where, read_pattern
from attnlab.patterns import Pattern

NAME = "attnlab"
# What other implementations of transformers take and this one does not.
_REFUSED = {
    "softcap": "a cap on the scores",
    "s_aux": "learned sinks",
    "cache": "continuous batching",
}


def register_transformers() -> None:
    """Make `attn_implementation="attnlab"` known to transformers, for every model that dispatches its attention.

        attnlab.hub.register_transformers()
        config.attnlab_pattern = "PowersOfTwo(block=256)"      # saved with the config; without it, all is as before
        model = AutoModelForCausalLM.from_config(config, attn_implementation="attnlab")

    `attnlab_pattern` is text or a table as `attnlab.hub.read_pattern` takes it, or a list of those, one for each layer
    (None leaves a layer as it is); a part of a model (a vision tower) has it in its own config. It narrows what the
    model allows: padding, causality and sliding windows stay, and positions count from the first real token of each
    text. `generate`, dynamic and static caches and batches with padding work. Calling this again does no harm.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError("register_transformers needs transformers 5: pip install 'attnlab[hf]'") from error
    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError("register_transformers needs transformers 5, whose masks know where the queries stand")
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


class HostMask(torch.Tensor):
    """transformers' bool mask `(B, 1, Nq, Nk)`, not made: whoever else looks at it gets it made for him.

    What it stands for, `host`, is a few numbers where the mask would be a gigabyte at 32,768 tokens.
    """

    host: Host
    keywords: dict[str, Any]

    @staticmethod
    def __new__(cls, host: Host, keywords: dict[str, Any]) -> HostMask:
        shape = (keywords["batch_size"], 1, host.nq, host.nk)
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=keywords["device"])
        made.host, made.keywords = host, keywords
        return made

    def made(self) -> Tensor:
        """The mask itself."""
        from transformers.masking_utils import sdpa_mask

        found = sdpa_mask(**self.keywords, allow_is_causal_skip=False)
        return cast(Tensor, found)  # None is for masks that may be skipped

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore
        args, kwargs = tree_map(lambda x: x.made() if isinstance(x, cls) else x, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"HostMask({tuple(self.shape)})"


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """What transformers calls once per pass for each kind of layer: a `HostMask`, or the mask where one is traced."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    ask: Any = causal_mask_function if mask_function is None else mask_function
    keywords: dict[str, Any] = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=ask, attention_mask=attention_mask, use_vmap=use_vmap, device=device,
    )  # fmt: skip
    if use_vmap or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return sdpa_mask(**keywords, allow_is_causal_skip=False)
    offset, gone = int(q_offset), int(kv_offset)
    real = None if attention_mask is None else attention_mask.bool()
    if real is not None and real.shape[1] < gone + kv_length:
        real = torch.nn.functional.pad(real, (0, gone + kv_length - real.shape[1]))
    for base, function in (("causal", causal_mask_function), ("full", bidirectional_mask_function)):
        if ask is function:
            rows = padded(real, q_length, kv_length, gone, offset, base == "causal")
            if rows is not None:
                return HostMask(Host(q_length, kv_length, offset, gone, base, rows), keywords)  # type: ignore
    whole = ask if real is None else _also(ask, real)
    # Where the host joins masks by "and", what it calls local is an upper bound.
    window = local_size if getattr(ask, "__qualname__", "").startswith("and_masks") else None
    every = torch.arange(batch_size, device=device)
    asked = Asked(whole, every if batch_size > 1 else every[:1], offset, gone, window)
    return HostMask(Host(q_length, kv_length, offset, gone, asked, _texts(real, kv_length, every)), keywords)


def _also(ask: Any, real: Tensor) -> Any:
    return lambda b, h, q, k: ask(b, h, q, k) & real[b, k]


def _texts(real: Tensor | None, nk: int, every: Tensor) -> list[Rows]:
    """The batch entries by where their text begins."""
    if real is None:
        return [Rows(None, 0, nk, 0)]
    firsts = real.long().argmax(1)
    kinds = firsts.unique().tolist()
    return [Rows(None if len(kinds) == 1 else every[firsts == first], 0, nk, first) for first in kinds]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: heads `(B, H, N, D)` → `(B, N, H, D)`, and no weights."""
    for name, what in _REFUSED.items():
        if others.get(name) is not None:
            raise ValueError(f"attn_implementation='attnlab' does not take {name} ({what}), which this model passes")
    where = pattern_of(module)
    if isinstance(attention_mask, HostMask):
        host = attention_mask.host
        if (host.nq, host.nk) != (query.shape[2], key.shape[2]):  # a model that cuts its keys cuts its mask, too
            raise ValueError(
                f"attention_mask is for {host.nq} queries and {host.nk} keys, got {query.shape[2]} and {key.shape[2]}"
            )
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal) and attention_mask is None and query.shape[2] > 1
        if attention_mask is not None and attention_mask.is_floating_point():
            position_bias = attention_mask if position_bias is None else position_bias + attention_mask
        host = tensor_host(attention_mask, causal, len(query), query.shape[2], key.shape[2])
    if isinstance(where, Pattern):
        where.check(host.nq + host.offset, host.nk)
    out = host.attend(query, key, value, where, scale=scaling, dropout=dropout, bias=position_bias)
    return out.transpose(1, 2).contiguous(), None


def pattern_of(module: nn.Module) -> Where | None:
    """The pattern that the config of an attention module gives its layer."""
    config = getattr(module, "config", None)
    given = getattr(config, "attnlab_pattern", None)
    if given is None:
        return None
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("attnlab_pattern is for one stack of layers, got an encoder-decoder: use attnlab.hub.swap")
    if isinstance(given, list):
        layer = getattr(module, "layer_idx", None)
        if layer is None or not 0 <= layer < len(given):
            raise ValueError(f"attnlab_pattern has {len(given)} entries, and none for layer {layer}")
        layers = getattr(config, "num_hidden_layers", len(given))
        if len(given) > layers:
            raise ValueError(f"attnlab_pattern has {len(given)} entries, and the model {layers} layers")
        given = given[layer]
    if given is None:
        return None
    if not isinstance(given, (str, Mapping)):
        raise TypeError(
            f"attnlab_pattern must be text, such as {given}, or a table, since it is saved with the config; "
            f"got {type(given).__name__}"
        )
    return read_pattern(given) if isinstance(given, str) else _table(json.dumps(given, sort_keys=True))


@lru_cache(maxsize=256)
def _table(text: str) -> Where:
    return read_pattern(json.loads(text))
