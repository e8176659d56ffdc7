"""Looks once at all heads of a model: measures of each, and the page that shows them."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.lens.analytics import Gather
from attnlab.lens.event import Event
from attnlab.lens.importance import Inputs, head_importance, joined, parts, run
from attnlab.lens.inputs import Shown
from attnlab.lens.measures.patterns import Patterns, find
from attnlab.lens.measures.pruning import Importance
from attnlab.lens.measures.spatial import Strength
from attnlab.lens.measures.weights import entropy, mean_distance, sink_mass
from attnlab.lens.subject import Subject
from attnlab.lens.subscriber import Subscriber
from attnlab.lens.viewer import analytics as pages
from attnlab.lens.viewer.view import Measure, Tokens, View
from attnlab.lens.where import Where

ENOUGH = 60.0  # seconds that importance may take without being asked for
_MOST_MAPS = 1024  # that the autoencoder reads


@dataclass(eq=False)
class Layer:
    """A layer that attends: what its tokens are, and what was measured of its heads."""

    name: str
    number: int
    heads: list[int]
    queries: Tokens
    keys: Tokens
    offset: int
    kind: str
    windows: int  # of the first input, over which its maps are averaged
    measures: dict[str, list[float]] = field(default_factory=dict)

    @property
    def note(self) -> str:
        cross = "cross-attention" if self.kind == "cross" else ""
        return ", ".join(x for x in (cross, f"mean over {self.windows} windows" * (self.windows > 1)) if x)


@dataclass(eq=False)
class Survey:
    """What was found: the layers, the page, and of an image model the three analyses where they could be made."""

    layers: list[Layer]
    view: View
    importance: Importance | None
    strength: Strength | None
    patterns: Patterns | None
    notes: list[str]


_UNITS = {"entropy": "nats", "distance": "tokens", "sink share": "", "strongest key": "", "importance": "bits"}
_ABOUT = {
    "entropy": "How widely a query looks, mean over queries: 0 for one key, ln n for n keys alike.",
    "distance": "How far a query looks, mean over queries.",
    "sink share": "How much of the attention the first token receives.",
    "strongest key": "How much of the attention the key receives that receives most, whichever that is.",
}


def survey(
    subject: Subject,
    shown: Shown,
    *,
    layers: Any = None,
    heads: Sequence[int] | None = None,
    importance: bool | None = None,
    metric: str = "jsd",
    mode: str = "leave_one_out",
    ablate: str = "zero",
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Runs the model on what it is shown, and looks at every head of `layers` and `heads` (all, if not given).

    Two passes find out how large everything is and then fill the page, layer by layer: no more than one layer's weights
    are in memory. Importance takes a pass for each head: by itself it is measured if that is done within a minute.

    Raises:
        ValueError: the input does not fit the model, a layer or head that is not there, a model in which no attention
            can be seen.
    """
    model, inputs, notes = subject.model, shown.inputs, [*subject.notes, *shown.notes]
    first = next(parts(inputs, 1))
    outline = _Outline(model, shown, Where(layers=layers, heads=heads))
    with torch.no_grad(), joined(model, outline):
        try:
            run(model, first)
        except (RuntimeError, AssertionError, IndexError, TypeError, AttributeError, KeyError) as error:
            what = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"input: {shown.what} does not fit {subject.name}: {what}") from error
    found = [outline.layers[i] for i in sorted(outline.layers)]
    if not found:
        raise ValueError("layers: none of those chosen attends")
    if outline.repeated:
        notes.append(f"{', '.join(outline.repeated)} attend several times in a pass; the first is shown.")
    view = View([(len(x.heads), x.queries, x.keys) for x in found], notes=notes)
    gather = _gather(found)
    say(f"{len(found)} layers, {sum(len(x.heads) for x in found)} heads")
    with torch.no_grad(), joined(model, _Fill(view, found)):
        run(model, first)
    scores = None
    total = sum(outline.every.values())
    if importance is None and layers is None and heads is None and not _multimodal(inputs):
        started = time.perf_counter()
        with torch.no_grad():
            run(model, first)
        expected = total * (time.perf_counter() - started) * shown.count
        importance = expected < ENOUGH
        if not importance:
            notes.append(f"Importance was not measured: it takes about {expected / 60:.1f} minutes (--importance).")
    if importance:
        try:
            scores = head_importance(
                model, inputs, shown.labels, mode=mode, ablate=ablate, batch=16, progress=progress
            )  # fmt: skip
        except ValueError as error:
            notes.append(f"Importance was not measured: {error}.")
    if scores is not None:
        table = scores.scores.get(metric)
        if table is None:
            raise ValueError(
                f"metric: {metric!r} was not measured (it may need labels); {', '.join(scores.scores)} were"
            )
        for layer in found:
            layer.measures["importance"] = [float(table[scores.names.index(layer.name), h]) for h in layer.heads]
    view.analytics = {}
    if scores is not None:
        rows = [scores.names.index(x.name) for x in found]
        kept = [x.heads for x in found]
        view.analytics["importance"] = pages.importance(scores, rows, kept, shown.count, shown.labels is not None)
    strength, named = None, None
    if gather is not None:
        say("how far heads look, and what they draw")
        with torch.no_grad(), joined(model, gather):
            for part in parts(inputs, 4):
                run(model, part)
        strength, named = _spatial(view.analytics, gather, found, shown.count, notes, seed)
    view.measures = _measures(found, scores, metric)
    view.notes = notes
    return Survey(found, view, scores, strength, named, notes)


def _gather(layers: Sequence[Layer]) -> Gather | None:
    """For the layers whose tokens are a grid of patches, with nothing but class tokens before it: most have it."""
    grids = [
        (x.queries.grid, x.queries.start)
        for x in layers
        if x.queries == x.keys and x.queries.grid and x.queries.start + math.prod(x.queries.grid) == x.queries.count
    ]
    if not grids:
        return None
    (grid, start), _ = Counter(grids).most_common(1)[0]
    gather = Gather(grid, start)
    gather.where = Where(layers=[x.number for x in layers])
    return gather


def _spatial(
    page: dict[str, Any], gather: Gather, layers: Sequence[Layer], images: int, notes: list[str], seed: int
) -> tuple[Strength | None, Patterns | None]:
    """Strength by hop and patterns, and both as the page has them."""
    try:
        found = gather.together()
    except ValueError as error:
        notes.append(f"Distance by hop and patterns are not shown: {error}.")
        return None, None
    at = {x.number: i for i, x in enumerate(layers)}
    both = [(row, at[number]) for row, number in enumerate(sorted(gather.strengths))]
    page["distance"] = pages.distance(found, both, [x.heads for x in layers], images)
    maps, where = gather.samples(_MOST_MAPS)
    kept = [i for i, (_, layer, head) in enumerate(where) if head in layers[at[layer]].heads]
    maps, where = maps[kept], [where[i] for i in kept]
    # Of few maps, small batches and many rounds: the autoencoder is to take some hundred steps. Of many, fewer rounds:
    # it is to be done within half a minute.
    batch, epochs = max(4, min(64, len(maps) // 8)), max(10, min(100, 8000 // len(maps)))
    named = find(maps, gather.small, seed=seed, batch=batch, epochs=epochs)
    heads = [(at[layer], layers[at[layer]].heads.index(head)) for _, layer, head in where]
    page["patterns"] = pages.patterns(named, maps, heads, gather.small, 1 + max(image for image, *_ in where))
    return found, named


def _multimodal(inputs: Inputs) -> bool:
    return not isinstance(inputs, Tensor) and "pixel_values" in inputs and "input_ids" in inputs


class _Outline(Subscriber):
    """Which layers there are, and how their tokens lie, from one pass over one input."""

    def __init__(self, model: nn.Module, shown: Shown, where: Where) -> None:
        from attnlab.hub.grids import Grids

        self.where, self.shown, self.grids = where, shown, Grids(model)
        self.layers: dict[int, Layer] = {}
        self.every: dict[str, int] = {}  # heads of all layers that were seen
        self.repeated: list[str] = []

    def open(self, model: nn.Module) -> list[Any]:
        return self.grids.open()

    def wants(self, event: Event) -> bool:
        self.every[event.name] = event.heads
        return True

    def after(self, event: Event, out: Tensor) -> None:
        if event.layer in self.layers:
            if event.name not in self.repeated:
                self.repeated.append(event.name)
            return
        heads = self.where.head_list(event)
        batch, queries, keys = event.q.shape[0], event.q.shape[2], event.k.shape[2]
        self.layers[event.layer] = Layer(
            event.name, event.layer, heads, self._tokens(event, queries, "q"), self._tokens(event, keys, "k"),
            event.offset, event.kind, batch,
        )  # fmt: skip

    def _tokens(self, event: Event, count: int, side: str) -> Tokens:
        labels = next((x for x in self.shown.tokens if len(x) == count), None)
        if labels is not None:
            if self.shown.patches is not None:
                start, grid = self.shown.patches
                return Tokens(count, labels, grid, start, self.shown.image)
            return Tokens(count, labels)
        if len(event.q) > 1:  # one input, so these are windows of it
            return Tokens(count)
        try:
            place = self.grids.of(event.name, count)
        except ValueError:
            return Tokens(count)
        if len(place.grid) != 2:
            return Tokens(count)
        rows, columns = place.grid
        before = ("[class]", *(f"[extra {i}]" for i in range(1, place.prefix)))[: place.prefix]
        patches = (f"row {i // columns}, column {i % columns}" for i in range(count - place.prefix))
        return Tokens(count, (*before, *patches), (rows, columns), place.prefix, self.shown.image)


class _Fill(Subscriber):
    """Measures each layer and puts it on the page, as the model runs on one input."""

    def __init__(self, view: View, layers: Sequence[Layer]) -> None:
        self.view, self.layers = view, {x.number: x for x in layers}
        self.where = Where(layers=list(self.layers))

    def after(self, event: Event, out: Tensor) -> None:
        layer = self.layers[event.layer]
        if event.index:
            return
        weights = event.weights()[:, layer.heads].float().mean(0)
        grid = layer.queries.grid if layer.queries == layer.keys else None
        far = mean_distance(weights, grid=grid, prefix=layer.keys.start, offset=layer.offset)
        if grid is not None:  # tokens that have no place on the grid have no distance to anything
            start = layer.queries.start
            far = far[..., start : start + grid[0] * grid[1]]
        layer.measures |= {
            "entropy": entropy(weights).mean(-1).tolist(),
            "distance": far.mean(-1).tolist(),
            "sink share": sink_mass(weights, 1).mean(-1).tolist(),
            "strongest key": weights.mean(-2).amax(-1).tolist(),
        }
        self.view.add(layer.name, weights, number=layer.number, heads=layer.heads, note=layer.note)


def _measures(layers: Sequence[Layer], scores: Importance | None, metric: str) -> list[Measure]:
    grids = {x.queries.grid is not None for x in layers}
    units = {
        **_UNITS,
        "distance": "patches" if grids == {True} else "tokens" if grids == {False} else "tokens or patches",
    }
    if metric != "jsd":
        units["importance"] = ""
    about = dict(_ABOUT)
    if scores is not None:
        whom = "without the head" if scores.mode == "leave_one_out" else "with this head alone in its layer"
        about["importance"] = f"How much the model's answer changes {whom} ({metric})."
    names = [n for n in _UNITS if n in layers[0].measures]
    names.sort(key=lambda n: n != "importance")
    return [Measure(n, [x.measures[n] for x in layers], units[n], about.get(n, "")) for n in names]
