"""Other attention in the models people already use: another pattern under their weights, or another mechanism."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from attnlab import cards, patterns
from attnlab.cost import count_flops
from attnlab.hub.convert import Old, Taken, convert
from attnlab.hub.convert import read as read_attention
from attnlab.hub.grids import Grids
from attnlab.hub.host import Host, tensor_host
from attnlab.hub.spelling import Where, read_pattern
from attnlab.hub.stand_ins import STAND_INS
from attnlab.lens.event import Event
from attnlab.lens.subscriber import Handle, Subscriber
from attnlab.lens.tap import join
from attnlab.lens.where import Layers
from attnlab.lens.where import Where as Choice
from attnlab.nn.mechanism import Mechanism
from attnlab.patterns import Pattern, Prefixed
from attnlab.patterns.grid import GridPattern
from attnlab.routing import Route

Grid = tuple[int, int]
What = Pattern | Route | str | type | Callable[[Grid], Pattern]
# What people call a mechanism beside its name here.
_ALIASES = {"moh": "mixture_of_heads"}


def swap(
    model: nn.Module,
    what: What,
    *,
    layers: Layers = None,
    grid: Grid | None = None,
    prefix: int | None = None,
    **options: Any,
) -> Swap:
    """Put another pattern under the weights of `model`, or another mechanism in the place of its attention.

        swap(vit, Neighborhood, kernel=7, layers=range(4))       each call's own grid, the class token sees all
        swap(llama, PowersOfTwo(block=64))                       causality, padding and the cache stay what they were
        swap(llama, "Window(512) | (Sinks(4) & Causal())")       the same as text
        swap(llama, ProxyHeads(0.95, minimum=1024))              a route: where, chosen from the content
        swap(vit, "gated")                                       a mechanism with the old weights, to be trained on

    A pattern narrows what each self-attention call may see and changes no weights. It works on whatever
    `attnlab.lens.tap` sees: timm, transformers, diffusers, torch and ours. Cross attention stays as it is. Positions
    count from the first real token of a text. A mechanism replaces attention modules of timm, transformers (with
    `q_proj`, `k_proj`, `v_proj` and an output projection), `nn.MultiheadAttention` or `MultiHead` for good, until it
    is undone; `print` the result for which weights were taken and which are new.

    Args:
        what: a `Pattern`; a `Route`; a class of patterns on a grid, or a function from a grid to a pattern, made for
            the grid of each call; the text of a pattern; the name or class of a mechanism ("moh", "gated", "sigmoid",
            "agent", "linear", "kda", or any of `attnlab.names(kind="tokens")`).
        layers: which, in the order in which they attend (of mechanisms: in which they are defined); ordinals, negative
            from the end, or globs on names. All if None.
        grid, prefix: how the tokens lie, where the model does not say: (H, W) behind so many tokens.
        options: of the class of patterns, or of the mechanism.

    Returns:
        The swap, which holds until `undo()`, or until the end of the `with` block that it is used in.

    Raises:
        TypeError, ValueError: `what` is none of these, a layer does not exist (those that do are listed), nothing was
        swapped, or (from the model's call) a grid is not known or does not fit. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    mechanism = _mechanism(what)
    if mechanism is not None:
        return MechanismSwap(model, mechanism, layers, Grids(model, grid, prefix), options)
    return PatternSwap(model, _chooser(what, options), layers, Grids(model, grid, prefix))


def _mechanism(what: Any) -> type[Mechanism] | None:
    if isinstance(what, type) and issubclass(what, Mechanism):
        return what
    if not isinstance(what, str) or "(" in what or what in patterns.__all__:
        return None
    card = cards.describe(_ALIASES.get(what, what))  # which says what names are close
    found = cards.target(card.name)
    if card.kind is not cards.TOKENS or not (isinstance(found, type) and issubclass(found, Mechanism)):
        raise ValueError(f"what must name a token mechanism, {what!r} is of kind {card.kind.value!r}")
    return found


# From a layer, how many tokens it attends over, and the grids: where its queries may look.
Chooser = Callable[[str, int, Grids], Where]


def _chooser(what: Any, options: Mapping[str, Any]) -> Chooser:
    if isinstance(what, str):
        what = getattr(patterns, what) if what in patterns.__all__ else read_pattern(what)
    if isinstance(what, type) and issubclass(what, Pattern) and "grid" not in inspect.signature(what).parameters:
        what, options = what(**options), {}
    if isinstance(what, (Pattern, Route)):
        if options:
            raise ValueError(f"options go with a class or a mechanism, got {what} and {', '.join(options)}")
        return _fixed(what)
    if not callable(what):
        raise TypeError(f"what must be a pattern, a route, a mechanism or a name of one, got {type(what).__name__}")
    make = what

    @lru_cache(maxsize=16)
    def made(grid: Grid, prefix: int) -> Pattern:
        pattern = make(grid=grid, **options) if isinstance(make, type) else make(grid, **options)
        if not isinstance(pattern, Pattern):
            raise TypeError(f"what must make a Pattern of a grid, got {type(pattern).__name__}")
        return Prefixed(pattern, prefix) if prefix else pattern

    def choose(layer: str, tokens: int, grids: Grids) -> Pattern:
        place = grids.of(layer, tokens)
        return made(place.grid, place.prefix)

    return choose


def _fixed(where: Where) -> Chooser:
    def choose(layer: str, tokens: int, grids: Grids) -> Where:
        if not isinstance(where, GridPattern) or torch.Size(where.grid).numel() == tokens:
            return where
        place = grids.of(layer, tokens)
        if place.grid != where.grid:
            raise ValueError(f"{layer}: the grid of what is swapped in is {where.grid}, the layer's is {place.grid}")
        return Prefixed(where, place.prefix) if place.prefix else where

    return choose


@dataclass(frozen=True)
class Difference:
    """What a swap changes on a probe: FLOPs of the whole model, and its output.

    `deviation` is ‖new − old‖ / ‖old‖ over all floating-point outputs, `largest` the largest single difference.
    """

    flops_before: int
    flops_after: int
    deviation: float
    largest: float
    layers: tuple[str, ...]

    @property
    def saved(self) -> float:
        """The share of the model's FLOPs that is saved; negative if there are more."""
        return 1.0 - self.flops_after / max(self.flops_before, 1)

    def __str__(self) -> str:
        return (
            f"{len(self.layers)} layers swapped: {self.flops_before / 1e9:.4g} → {self.flops_after / 1e9:.4g} GFLOPs "
            f"({self.saved:+.1%} saved), output off by {self.deviation:.3g} of its norm, at most {self.largest:.3g}"
        )


class Swap:
    """A swap that holds until `undo`; as a context manager, until the end of the block."""

    model: nn.Module
    layers: tuple[str, ...] = ()

    def undo(self) -> None:
        """Leave the model as it was before; what has been undone stays so."""
        raise NotImplementedError

    def _switch(self, on: bool) -> None:
        raise NotImplementedError

    def __enter__(self) -> Swap:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    @torch.no_grad()
    def explain(self, *probe: Any, **keywords: Any) -> Difference:
        """Run the model on a probe as it was and as it is, with the same randomness: FLOPs saved, output changed."""
        found: list[Any] = []
        flops = []
        at = torch.random.get_rng_state()
        try:
            for on in (False, True):
                self._switch(on)
                torch.random.set_rng_state(at)
                flops.append(count_flops(lambda: found.append(self.model(*probe, **keywords))))
        finally:
            self._switch(True)
        old, new = ([x.double() for x in tree_leaves(y) if _counts(x)] for y in found)
        if not old or [x.shape for x in old] != [x.shape for x in new]:
            raise ValueError(f"the outputs of {type(self.model).__name__} cannot be compared")
        apart = [b - a for a, b in zip(old, new, strict=True)]
        norm = sum(float(x.square().sum()) for x in old) ** 0.5
        deviation = sum(float(x.square().sum()) for x in apart) ** 0.5 / max(norm, 1e-300)
        return Difference(flops[0], flops[1], deviation, max(float(x.abs().max()) for x in apart), self.layers)


@lru_cache(maxsize=256)
def _shows(where: Pattern, keys: int, layer: str) -> None:
    """Raise if the first, the middle and the last token see no key at all."""
    if where.per_batch or where.per_head:
        return
    zero = torch.zeros((), dtype=torch.long)
    some = torch.tensor([[0], [keys // 2], [keys - 1]])
    if not where.allows(zero, zero, some, torch.arange(keys)).any():
        raise ValueError(f"{where} hides every key of the {keys} that {layer} looks at")


def _counts(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 0


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
        it = None if mask is None else (mask.data_ptr(), mask.shape, mask.stride(), mask._version)
        at = self._caches.of(event.module)
        key = (it, event.is_causal, len(event.q), nq, nk, at)
        last = self._last
        if last is None or last[0] != key:
            # The mask is kept, so that no other can come to lie where it lies.
            last = self._last = (key, tensor_host(mask, event.is_causal, len(event.q), nq, nk, at=at), mask)
        return last[1]

    def __str__(self) -> str:
        return f"another pattern in {', '.join(self.layers) or 'no layer yet: run the model'}"


class MechanismSwap(Swap):
    """Other modules in the place of a model's attention, with the old weights where they fit (`report`)."""

    def __init__(
        self, model: nn.Module, by: type[Mechanism], layers: Layers, grids: Grids, options: Mapping[str, Any]
    ) -> None:
        self.model = model
        found = [(n, m, old) for n, m in model.named_modules() if (old := read_attention(m)) is not None]
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no attention module that can be replaced: those of timm, transformers "
                "(q_proj, k_proj, v_proj), torch (MultiheadAttention) and attnlab (MultiHead) can; patterns work on all"
            )
        chosen = _chosen(layers, [n for n, _, _ in found])
        if found[0][0] == "":
            raise ValueError("model is an attention module itself: swap it in the model that holds it")
        card: cards.Card | None = getattr(by, "card", None)
        on_grid = card is not None and cards.ANY_GRID in card.capabilities
        self._pairs: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        report = []
        for name, module, old in found:
            if name not in chosen:
                continue
            known = grids.known(name) if on_grid else {}
            mixer, taken = convert(old, by, dict(options), name, known)
            new = _stand_in(mixer, module, old, name, grids if on_grid else None).train(module.training)
            parent, _, child = name.rpartition(".")
            self._pairs.append((model.get_submodule(parent), child, module, new))
            report.append(taken)
        self.report: tuple[Taken, ...] = tuple(report)
        self.layers = tuple(taken.name for taken in report)
        self._handles = grids.open() if on_grid else []
        self._switch(True)

    def undo(self) -> None:
        """The old modules, as they were, in their places."""
        if self._pairs:
            self._switch(False)
        for handle in self._handles:
            handle.remove()
        self._pairs, self._handles = [], []

    def _switch(self, on: bool) -> None:
        for parent, child, old, new in self._pairs:
            setattr(parent, child, new if on else old)

    def __str__(self) -> str:
        return "\n".join(map(str, self.report))


def _stand_in(mixer: Mechanism, module: nn.Module, old: Old, name: str, grids: Grids | None) -> nn.Module:
    return mixer if old.host == "ours" else STAND_INS[old.host](mixer, module, old, name, grids)


def _chosen(layers: Layers, names: list[str]) -> set[str]:
    """The names that `layers` means; ValueError, which lists them, where it means none of them."""
    if layers is None:
        return set(names)
    if isinstance(layers, slice):
        return set(names[layers])
    if callable(layers):
        raise TypeError("layers must be ordinals or names for a mechanism: there is no event to ask a function about")
    wanted = [layers] if isinstance(layers, (int, str)) else list(cast(Iterable[Any], layers))
    found: set[str] = set()
    for one in wanted:
        if isinstance(one, str):
            mine = [n for n in names if fnmatchcase(n, one)]
        else:
            mine = [names[one]] if -len(names) <= one < len(names) else []
        if not mine:
            there = ", ".join(f"{i} {n}" for i, n in enumerate(names))
            raise ValueError(f"layers: {one!r} is not there; there are {there}")
        found |= set(mine)
    return found
