"""Another pattern under unchanged weights, at the tap of a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.grids import Grids
from attnlab.hub.host import Host, tensor_host
from attnlab.hub.spelling import Where
from attnlab.hub.swapped import Swap
from attnlab.lens.event import Event
from attnlab.lens.subscriber import Handle, Subscriber
from attnlab.lens.tap import join
from attnlab.lens.where import Layers
from attnlab.lens.where import Where as Choice
from attnlab.patterns import Pattern

# From a layer, how many tokens it attends over, and the grids: where its queries may look.
Chooser = Callable[[str, int, Grids], Where]


class Caches:
    """Where the queries and the keys of a call stand, as the cache of a transformers model says."""

    def __init__(self) -> None:
        self._now = threading.local()

    def open(self, model: nn.Module) -> list[Handle]:
        layers = (m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int))
        return [m.register_forward_pre_hook(self._read, with_kwargs=True) for m in layers]

    def _read(self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        cache: Any = keywords.get("past_key_values")
        x = keywords.get("hidden_states", next(iter(arguments), None))
        places = self._now.__dict__.setdefault("places", {})
        places.pop(module, None)
        if hasattr(cache, "get_mask_sizes") and hasattr(cache, "get_query_offset") and isinstance(x, Tensor):
            gone = cache.get_mask_sizes(x.shape[1], module.layer_idx)[1]
            places[module] = (int(cache.get_query_offset(module.layer_idx)), int(gone))

    def of(self, module: nn.Module) -> tuple[int, int] | None:
        """The positions of the first query and of the first key of the module's call; None without a cache."""
        return getattr(self._now, "places", {}).get(module)


class PatternSwap(Swap, Subscriber):
    """Another pattern under unchanged weights, at the tap of a model."""

    def __init__(self, model: nn.Module, choose: Chooser, layers: Layers, grids: Grids) -> None:
        self.model, self._choose, self._grids = model, choose, grids
        self.where = Choice(layers=layers)
        self._on = True
        self._caches = Caches()
        self._last: tuple[Any, Host, Tensor | None] | None = None
        self._leave: Callable[[], None] | None = join(model, self)

    def undo(self) -> None:
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()

    @property
    def holds(self) -> bool:
        return self._leave is not None

    def _switch(self, on: bool) -> None:
        self._on = on

    def open(self, model: nn.Module) -> Iterable[Handle]:
        return [*self._grids.open(), *self._caches.open(model)]

    def finish(self, step: int) -> None:
        self._last = None
        if self._on and not self.layers:
            raise ValueError(f"nothing was swapped: no chosen layer of {type(self.model).__name__} looks at itself")

    def wants(self, event: Event) -> bool:
        return self._on and event.kind == "self" and event.source != "scan"

    def before(self, event: Event) -> None:
        where = self._choose(event.name, event.k.shape[2], self._grids)
        if event.name not in self.layers:
            self.layers = (*self.layers, event.name)
        if event.source == "attend":
            self._narrow(event, where)
            return
        if event.pattern is not None or event.route is not None:
            raise ValueError(f"{event.name} has another pattern already: undo that swap, or join the two by &")
        host = self._host(event)
        mask = event.mask if event.mask is not None and event.mask.dtype != torch.bool else None
        event.mask, event.is_causal = mask, False
        if isinstance(where, Pattern):
            where.check(host.nq + host.offset, host.nk)
            _shows(where, host.nk, event.name)
            event.pattern = host.pattern(where)
        else:
            event.pattern = host.pattern(None)
            event.route = where if host.nq == host.nk else None
        bias = None if mask is None else mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        event.stands(
            lambda: host.attend(
                event.q, event.k, event.v, where, scale=event.scale, dropout=event.dropout, bias=bias
            )
        )  # fmt: skip

    def _narrow(self, event: Event, where: Where) -> None:
        """A call of our own `attend`, whose pattern says what the model allows."""
        offset = max(event.k.shape[2] - event.q.shape[2], 0)
        if isinstance(where, Pattern):
            where.check(event.q.shape[2] + offset, event.k.shape[2])
            here = where.starting_at(offset)
            event.pattern = here if event.pattern is None else here & event.pattern
        elif offset == 0:
            event.route = where

    def _host(self, event: Event) -> Host:
        """What the model hides; layers of one pass that share a mask share the answer."""
        mask, nq, nk = event.mask, event.q.shape[2], event.k.shape[2]
        it: Any = None
        if mask is not None:
            # Changes of inference tensors are not counted: each call reads such a mask anew.
            version = object() if mask.is_inference() else mask._version
            it = mask.data_ptr(), mask.shape, mask.stride(), version
        at = self._caches.of(event.module)
        key = (it, event.is_causal, len(event.q), nq, nk, at)
        last = self._last
        if last is None or last[0] != key:
            # The mask is kept, so that no other can come to lie where it lies.
            last = self._last = (key, tensor_host(mask, event.is_causal, len(event.q), nq, nk, at=at), mask)
        return last[1]

    def __str__(self) -> str:
        return f"another pattern in {', '.join(self.layers) or 'no layer yet: run the model'}"


@lru_cache(maxsize=256)
def _shows(where: Pattern, keys: int, layer: str) -> None:
    """Raise if the first, the middle and the last token see no key at all."""
    if where.per_batch or where.per_head:
        return
    zero = torch.zeros((), dtype=torch.long)
    some = torch.tensor([[0], [keys // 2], [keys - 1]])
    if not where.allows(zero, zero, some, torch.arange(keys)).any():
        raise ValueError(f"{where} hides every key of the {keys} that {layer} looks at")
