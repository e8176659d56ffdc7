"""Our mechanisms in the place of others' attention modules, called as those are called."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from attnlab.hub.convert import Old, Turned
from attnlab.hub.grids import Grids
from attnlab.hub.host import Host, Rows, Within, tensor_host
from attnlab.nn.cache import KVCache
from attnlab.nn.mechanism import Mechanism
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Causal, Pattern


class StandIn(nn.Module):
    """A mechanism, `mixer`, in the place of a module `old` that was called `name`, with that one's forward."""

    def __init__(self, mixer: Mechanism, old: nn.Module, read: Old, name: str, grids: Grids | None) -> None:
        super().__init__()
        self.mixer, self.name, self.grids = mixer, name, grids
        self.out_dropout = read.out_dropout or nn.Identity()
        # Those around the old module may ask it for these.
        for attribute in ("config", "layer_idx", "is_causal", "head_dim", "num_key_value_groups", "num_heads"):
            if hasattr(old, attribute):
                setattr(self, attribute, getattr(old, attribute))

    def mix(self, x: Tensor, host: Host, context: Tensor | None = None, state: Any = None) -> Any:
        """The mixer on tokens that the host masks so."""
        keywords: dict[str, Any] = {} if context is None else {"context": context}
        if self.grids is not None:
            keywords["grid"] = self._grid(x.shape[1])
        pattern = _pattern(host, self.mixer.causal, isinstance(state, HostCache))
        if pattern is not None:
            keywords["pattern"] = pattern
        try:
            return self.mixer(x, **keywords) if state is None else self.mixer(x, state=state, **keywords)
        except ValueError as error:
            if "takes no pattern" not in str(error):
                raise
            raise ValueError(
                f"{self.name}: {_what(host)}, and {type(self.mixer).__name__} can leave nothing out: "
                "give texts of one length, or swap in a mechanism that takes masks"
            ) from error

    def _grid(self, tokens: int) -> tuple[int, ...]:
        place = cast(Grids, self.grids).of(self.name, tokens)
        own = int(bool(getattr(self.mixer, "class_token", False)))
        if place.prefix != own:
            raise ValueError(
                f"{self.name}: {type(self.mixer).__name__} mixes a grid behind {own} tokens, but {place.prefix} stand "
                f"before it ({place.source})"
            )
        return place.grid


class TimmStandIn(StandIn):
    """Called as timm's attention: `(x, attn_mask, is_causal)` → y."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        _agree(self, is_causal)
        _hides_only("attn_mask", attn_mask)
        host = tensor_host(attn_mask, is_causal or self.mixer.causal, len(x), x.shape[1], x.shape[1])
        return self.out_dropout(self.mix(x, host))


class _Foreign(torch.Tensor):
    """A tensor of no kind that torch's shortcuts know."""


class TorchStandIn(StandIn):
    """Called as `nn.MultiheadAttention`: `(query, key, value, …)` → (y, None), weights wanted or not."""

    _qkv_same_embed_dim = False  # or torch's layers would take a path of their own around this module

    def __init__(self, mixer: Mechanism, old: nn.MultiheadAttention, read: Old, name: str, grids: Grids | None) -> None:
        super().__init__(mixer, old, read, name, grids)
        self.batch_first = old.batch_first

    @property
    def in_proj_weight(self) -> Tensor:
        """A tensor that torch's encoder may look at, and that keeps it from the same path."""
        return next(self.mixer.parameters()).as_subclass(_Foreign)

    in_proj_bias = in_proj_weight

    @property
    def out_proj(self) -> Any:
        return getattr(self.mixer, "wo", None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if query.dim() != 3 or query.is_nested:
            raise ValueError(f"query must be a batch, (B, N, C) or (N, B, C), got {tuple(query.shape)}")
        if key is not value and not torch.equal(key, value):
            raise ValueError("key and value must be the same tokens: the mechanism that stands here takes one context")
        x, context = (t if self.batch_first else t.transpose(0, 1) for t in (query, key))
        same = query is key
        _agree(self, is_causal)
        mask = _torch_mask(attn_mask, key_padding_mask, len(x))
        causal = mask is None and self.mixer.causal
        host = tensor_host(mask, causal, len(x), x.shape[1], context.shape[1], crossing=not same)
        y = self.mix(x, host, None if same else context)
        return (y if self.batch_first else y.transpose(0, 1)), None


def _hides_only(name: str, mask: Tensor | None) -> None:
    """Raise if a mask adds numbers to the scores that neither hide a key nor leave it."""
    if mask is None or mask.dtype == torch.bool or bool(((mask == 0) | (mask <= -1e4)).all()):
        return
    raise ValueError(f"{name} must hide keys or leave them, got one that adds other numbers to the scores")


def _torch_mask(mask: Tensor | None, padding: Tensor | None, batch: int) -> Tensor | None:
    """torch's masks, True where a key is hidden or numbers to add, as one bool mask, True where it is seen."""
    found: Tensor | None = None
    for given, shape in ((mask, None), (padding, (batch, 1, 1, -1))):
        if given is None:
            continue
        seen = ~given if given.dtype == torch.bool else given > -1e4
        if shape is not None:
            seen = seen.view(*shape)
        elif seen.dim() == 3:
            seen = seen.unflatten(0, (batch, -1))
        _hides_only("attn_mask", given)
        found = seen if found is None else found & seen
    return found


# Tensors that an attention of transformers may be given, and what becomes of them is known (the last two say again what
# the rotations and the cache say).
_UNDERSTOOD = ("hidden_states", "attention_mask", "position_ids", "cache_position")


class TransformersStandIn(StandIn):
    """Called as the attention of a transformers model, by whatever names that one had: → (y, None).

    With `past_key_values`, mechanisms that keep keys and values keep them there, in the host's own cache. Those with
    a state of their own keep it beside the cache, which then counts the tokens.
    """

    def __init__(self, mixer: Mechanism, old: nn.Module, read: Old, name: str, grids: Grids | None) -> None:
        super().__init__(mixer, old, read, name, grids)
        self.parameters_of_old = tuple(inspect.signature(old.forward).parameters)
        self._states: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_states": None}  # states go with their caches, which are not saved

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_states": weakref.WeakKeyDictionary()})

    def forward(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, None]:
        given = {**dict(zip(self.parameters_of_old, arguments, strict=False)), **keywords}
        x, mask, cache = (given.get(n) for n in ("hidden_states", "attention_mask", "past_key_values"))
        cache = getattr(cache, "self_attention_cache", cache)  # of an encoder-decoder's two
        if not isinstance(x, Tensor):
            raise TypeError(f"hidden_states must be a tensor, got {type(x).__name__}")
        strange = [n for n, value in given.items() if isinstance(value, Tensor) and n not in _UNDERSTOOD]
        if given.get("key_value_states") is not None or given.get("encoder_hidden_states") is not None:
            raise ValueError(f"{self.name} looks at another sequence: leave it out with layers=")
        if strange:
            raise ValueError(f"{self.name} is called with {', '.join(strange)}, which the mechanism there cannot take")
        turned = getattr(self.mixer, "position", None)
        if isinstance(turned, Turned):
            turned.angles = given.get("position_embeddings")
        before = 0 if cache is None else int(cache.get_seq_length(self._layer))
        host = self._host(mask, x, before)
        if cache is None:
            return self.mix(x, host), None
        if host.gone:
            raise ValueError(f"{self.name}: past_key_values drops old tokens (a sliding window): use_cache=False")
        if _keeps_keys(self.mixer):
            y, _ = self.mix(x, host, state=HostCache(cache, self._layer, before))
            return y, None
        return self._stream(x, host, cache, before), None

    @property
    def _layer(self) -> int:
        return int(getattr(self, "layer_idx", 0))

    def _host(self, mask: Any, x: Tensor, before: int) -> Host:
        host = getattr(mask, "host", None)  # of `hub.transformers_attention`
        if isinstance(host, Host):
            return host
        if mask is None:
            nk = before + x.shape[1]
            return Host(x.shape[1], nk, before, 0, "causal" if self.mixer.causal else "full", [Rows(None, 0, nk, 0)])
        _hides_only("attention_mask", mask)
        return tensor_host(mask, False, len(x), x.shape[1], mask.shape[-1])

    def _stream(self, x: Tensor, host: Host, cache: Any, before: int) -> Tensor:
        """A step of a mechanism with a state, which is kept for as long as the cache lives."""
        if before:
            if cache not in self._states:
                raise ValueError(f"{self.name}: past_key_values holds {before} tokens that this layer has not seen")
            state = self._states[cache]
        else:
            state = self.mixer.initial_state(len(x), device=x.device, dtype=x.dtype)
        # The cache counts tokens, and shows whether somebody has reordered it: each sample keeps its own number.
        numbers = torch.arange(len(x), device=x.device, dtype=x.dtype).view(-1, 1, 1, 1).expand(-1, 1, x.shape[1], 1)
        kept, _ = cache.update(numbers, numbers, self._layer)
        if not torch.equal(kept[:, 0, 0, 0], numbers[:, 0, 0, 0]):
            raise ValueError(f"{self.name}: past_key_values was reordered (beam search), which its state cannot follow")
        y, self._states[cache] = self.mix(x, host, state=state)
        return y


class HostCache(KVCache):
    """The cache of a transformers model, as our mechanisms know one."""

    def __init__(self, cache: Any, layer: int, length: int) -> None:
        super().__init__()
        self._cache, self._layer, self.length = cache, layer, length

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.length += k.shape[2]
        return self._cache.update(k, v, self._layer)


@dataclass(frozen=True, eq=False)
class _Absolute(Pattern):
    """What a host says of its call, where the first query stands at `offset`."""

    within: Within
    offset: int
    per_batch = True
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        object.__setattr__(self, "per_head", self.within.per_head)

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.within.allows(b, h, q - self.offset, k)


def _pattern(host: Host, causal: bool, cached: bool) -> Pattern | None:
    """What a mechanism must be told of the host's mask beyond that it is causal, or is not; None if nothing."""
    bare = len(host.rows) == 1 and host.rows[0].batch is None and host.rows[0].start == 0
    if bare and host.base == ("causal" if causal else "full") and (causal or host.rows[0].end >= host.nk):
        # A cache of fixed size holds places that are not filled yet: say that they lie ahead.
        return Causal() if cached and causal and host.nk > host.offset + host.nq else None
    if bare and causal and host.base == "full" and host.nq == 1 and host.rows[0].end >= host.offset + 1:
        return Causal() if cached and host.nk > host.offset + 1 else None
    return _Absolute(Within(host, None), host.offset)


def _what(host: Host) -> str:
    if len(host.rows) > 1 or host.rows[0].start:
        return "attention_mask hides padding"
    return f"attention_mask is {host.base if isinstance(host.base, str) else 'of a kind of its own'}"


def _agree(stand_in: StandIn, is_causal: bool) -> None:
    if is_causal and not stand_in.mixer.causal:
        raise ValueError(f"{stand_in.name} is called with is_causal=True: swap with causal=True")


def _keeps_keys(mixer: Mechanism) -> bool:
    """Whether what it remembers is its keys and values, all of them, and nothing else."""
    if not isinstance(mixer, MultiHead) or not mixer.causal:
        return False
    return type(mixer.initial_state(1)) is KVCache


STAND_INS: dict[str, type[StandIn]] = {
    "timm": TimmStandIn,
    "torch": TorchStandIn,
    "transformers": TransformersStandIn,
}
