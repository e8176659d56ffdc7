"""Other attention in the models people already use: another pattern under their weights, or another mechanism."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from attnlab import cards, patterns
from attnlab.hub.grids import Grids
from attnlab.hub.mechanism_swap import MechanismSwap
from attnlab.hub.pattern_swap import Chooser, PatternSwap
from attnlab.hub.spelling import Where, read_pattern
from attnlab.hub.swapped import Swap
from attnlab.lens.where import Layers
from attnlab.nn.mechanism import Mechanism
from attnlab.patterns import Pattern, Prefixed
from attnlab.patterns.grid import GridPattern
from attnlab.routing import Route

Grid = tuple[int, ...]
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
        grid, prefix: how the tokens lie, where the model does not say: (H, W), or (T, H, W), behind so many tokens.
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
