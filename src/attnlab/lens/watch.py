"""Watching: what the attention of any model does, recorded while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnlab.autocast import autocast_off
from attnlab.lens.event import Event
from attnlab.lens.measures.weights import entropy, max_weight, mean_distance, received, sink_mass
from attnlab.lens.record import Entry, Record, misfit, tokens_before
from attnlab.lens.subscriber import Subscriber
from attnlab.lens.tap import join
from attnlab.lens.where import Choice, Layers, Where
from attnlab.patterns import Causal
from attnlab.statistics import Statistics, statistics
from attnlab.weightings import SOFTMAX

Keep = Literal["weights", "stats", "outputs"] | Callable[[Event, Tensor], Any]


@contextmanager
def watch(
    model: nn.Module, *, layers: Layers = None, heads: Choice = None, steps: Choice = None, keep: Keep = "weights",
    tokens: Sequence[Any] | None = None, grid: tuple[int, ...] | None = None, prefix: int | None = None,
    sinks: int = 1, detach: bool = True, device: torch.device | str | None = "cpu",
    dtype: torch.dtype | None = None,
) -> Iterator[Record]:  # fmt: skip
    """Record the attention of `model` while the block runs: `with watch(model) as record: model(x)`.

    Joins the open tap of the model, if there is one, and sees what comes of the edits made there. What gradient
    checkpointing computes again is not recorded again.

    Args:
        layers, heads, steps: which to record (see `Where`): ordinals, slices, names and globs of layers; all if None.
        keep: "weights" `(B, H, Nq, Nk)`, memory N² a layer; "stats", their `Statistics` in memory N, at any length;
            "outputs" of the heads `(B, H, Nq, Dv)`; or a function of (event, output) that returns a tensor, a number, a
            dict of them, or None to keep nothing.
        tokens: labels of the keys: one list, or one for each of the batch.
        grid: (height, width) of image tokens, row-major; distances are then on it, in the layers that it fits.
        prefix: tokens before the grid; None is the model's `num_prefix_tokens`, or what is left over if that is little.
        sinks: how many of the first keys count as sinks in statistics.
        detach: False keeps the graph, so that a gradient flows through what is recorded (not through statistics).
        device, dtype: where and as what to keep it; None leaves it.

    Raises:
        ValueError: a layer or head that does not exist, from the model's call; at the end, a grid or labels that fit no
            recorded layer.
    """
    if keep not in ("weights", "stats", "outputs") and not callable(keep):
        raise ValueError(f"keep must be 'weights', 'stats', 'outputs' or a function of (event, output), got {keep!r}")
    if keep == "stats" and not detach:
        raise ValueError("detach=False wants keep='weights', 'outputs' or a function: statistics carry no gradient")
    if grid is not None and (
        not isinstance(grid, Sequence) or not grid or any(not isinstance(n, int) or n < 1 for n in grid)
    ):
        raise ValueError(f"grid must be positive integers (height, width), got {grid!r}")
    for name, count in (("prefix", prefix), ("sinks", sinks)):
        if count is not None and (not isinstance(count, int) or count < 0):
            raise ValueError(f"{name} must be 0 or more, got {count!r}")
    if tokens is not None and (not isinstance(tokens, Sequence) or not len(tokens)):
        raise ValueError(f"tokens must be labels of the keys, or a list of them for each of the batch, got {tokens!r}")
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise ValueError(f"dtype must be a torch.dtype of floating point, got {dtype!r}")
    for name, choice in (("layers", layers), ("heads", heads)):
        if isinstance(choice, Sequence) and not len(choice):
            raise ValueError(f"{name}={choice!r} chooses nothing to watch")
    if prefix is None and grid is not None:
        said = getattr(model, "num_prefix_tokens", None)
        prefix = said if isinstance(said, int) else None
    record = Record(
        keep if isinstance(keep, str) else "values", tokens=tokens, grid=grid, prefix=prefix, sinks=sinks,
        model=type(model).__name__,
    )  # fmt: skip
    where = Where(layers=layers, heads=heads, steps=steps)
    leave = join(model, _Watcher(record, where, keep, detach, torch.device(device) if device else None, dtype))
    try:
        yield record
    finally:
        leave()
    _check_labels(record)


class _Watcher(Subscriber):
    """Keeps what it sees in a record."""

    def __init__(
        self, record: Record, where: Where, keep: Keep, detach: bool, device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        self.record, self.where, self.keep, self.detach = record, where, keep, detach
        self.device, self.dtype = device, dtype
        self.last: dict[tuple[str, int], Entry] = {}

    def wants(self, event: Event) -> bool:
        return not event.recomputed

    def after(self, event: Event, out: Tensor) -> None:
        heads = self.where.head_list(event)
        nq, nk = event.q.shape[2], event.k.shape[2]
        entry = Entry(
            event.name, event.layer, event.index, event.step, event.kind, tuple(heads), event.heads, nq, nk,
            event.offset, self.record.before(nk) if nq == nk else None,
        )  # fmt: skip
        # In generation the grid stays where it was in the prompt.
        before = self.last.get((event.name, event.index))
        if before is not None and entry.continues(before):
            entry.prefix = before.prefix
        self.last[event.name, event.index] = entry
        if callable(self.keep):
            kept = _as_tensors(self.keep(event, out), event)
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach):
                kept = self._seen(event, entry, out)
        if kept is not None:
            fresh = self.keep == "stats" or (self.keep == "weights" and event.computed is None)
            entry.kept = {name: self._put(x, not fresh) for name, x in kept.items()}
            self.record.entries.append(entry)

    def _seen(self, event: Event, entry: Entry, out: Tensor) -> dict[str, Tensor]:
        heads = list(entry.heads)
        if self.keep == "outputs":
            return {"": out if len(heads) == event.heads else out[:, heads]}
        # Inside autocast, products of what is kept exact would not be.
        with autocast_off(event.q):
            if self.keep == "weights":
                few, left = of_heads(event, heads)
                weights = few.weights()
                return {"": weights if left is None else weights[:, left]}
            place = self.record.where_of(entry)
            found = event_statistics(event, heads, sinks=self.record.sinks, **place)
        return {f.name: getattr(found, f.name) for f in fields(found) if f.name != "out"}

    def _put(self, x: Tensor, shared: bool) -> Tensor:
        x = x.detach() if self.detach else x
        moved = x.to(self.device or x.device, self.dtype if x.is_floating_point() else None)
        # What the model goes on with, it may change in place.
        return moved.clone() if shared and moved.data_ptr() == x.data_ptr() else moved


def event_statistics(
    event: Event, heads: Sequence[int] | None = None, *, grid: tuple[int, ...] | None = None, prefix: int | None = None,
    offset: int = 0, sinks: int = 1,
) -> Statistics:  # fmt: skip
    """Statistics of a call as it stands, for some of its heads, in memory that grows with the tokens.

    Where somebody edits the weights, all of them have been computed, and they are summed up as they are.
    """
    heads = list(range(event.heads)) if heads is None else list(heads)
    if event.source == "scan":
        raise ValueError(
            f"{event.name} keeps a running state, which has no statistics of softmax: watch it with keep='weights', "
            "which gives the matrix that the state stands for, or leave it out of layers=…"
        )
    few, left = of_heads(event, heads)
    if event.computed is not None:
        return _of_weights(few.weights() if left is None else few.weights()[:, left], grid, prefix, offset, sinks)
    if event.weighting != SOFTMAX:
        raise ValueError(
            f"statistics are of softmax attention, and {event.name} weighs by {event.weighting}: keep='weights'"
        )
    pattern = few.pattern
    if few.is_causal:
        pattern = Causal() if pattern is None else pattern & Causal()
    found = statistics(
        few.q, few.k, mask=few.mask, pattern=pattern, route=few.route, bias=few.bias, scale=few.scale, grid=grid,
        prefix=prefix, offset=offset, sinks=sinks,
    )  # fmt: skip
    if left is None:
        return found
    per_head = {f.name: getattr(found, f.name)[:, left] for f in fields(found) if f.name != "out"}
    return Statistics(**per_head, out=None)


def of_heads(event: Event, heads: Sequence[int]) -> tuple[Event, list[int] | None]:
    """The call with few more than `heads`, and which of its heads are those; None if just these are left."""
    heads = list(heads)
    apart = event.route is not None or callable(event.bias) or (event.pattern is not None and event.pattern.per_head)
    if heads == list(range(event.heads)):
        return event, None
    if apart or event.source == "scan":
        # What depends on the number of the head cannot be renumbered.
        return event, heads
    groups = event.heads // event.kv_heads
    keys = [h // groups for h in heads]
    computed = None if event.computed is None else event.computed[:, heads]
    few = replace(
        event, q=event.q[:, heads], k=event.k[:, keys], v=event.v[:, keys], mask=_some(event.mask, heads),
        bias=_some(event.bias, heads), native=None, computed=computed,
    )  # fmt: skip
    return few, None


def _some(x: Any, heads: list[int]) -> Any:
    return x[..., heads, :, :] if isinstance(x, Tensor) and x.dim() > 2 and x.shape[-3] > 1 else x


def _of_weights(
    weights: Tensor, grid: tuple[int, ...] | None, prefix: int | None, offset: int, sinks: int
) -> Statistics:
    """The same of weights that there are. What they were divided by is not known: lse is nan."""
    unknown = torch.full(weights.shape[:-1], torch.nan, dtype=weights.dtype, device=weights.device)
    return Statistics(
        entropy=entropy(weights), received=received(weights), max=max_weight(weights),
        distance=mean_distance(weights, grid=grid, prefix=prefix or 0, offset=offset),
        sink_mass=sink_mass(weights, sinks), lse=unknown, out=None,
    )  # fmt: skip


def _as_tensors(kept: Any, event: Event) -> dict[str, Tensor] | None:
    """What a function returned, by name."""
    if kept is None:
        return None
    named = kept if isinstance(kept, dict) else {"": kept}
    found = {}
    for name, value in named.items():
        if isinstance(value, bool | int | float):
            value = torch.tensor(value)
        if not isinstance(value, Tensor) or not isinstance(name, str):
            raise TypeError(
                f"keep must return a tensor, a number, a dict of them by name, or None; at {event.name} it returned "
                f"{type(value).__name__}"
            )
        found[name] = value
    return found


def _check_labels(record: Record) -> None:
    """Raise ValueError if the grid or the labels fit nothing that was recorded."""
    if not record.entries:
        return
    lengths = sorted({n for e in record.entries for n in (e.nq, e.nk)})
    if record.grid is not None and all(tokens_before(n, record.grid, record.prefix) is None for n in lengths):
        raise ValueError(misfit(record.grid, record.prefix, lengths))
    if record.tokens is not None:
        rows = [record.tokens] if isinstance(record.tokens[0], str) else record.tokens
        counts = {len(row) for row in rows}
        if not counts & set(lengths):
            raise ValueError(
                f"{', '.join(map(str, sorted(counts)))} token labels do not fit the lengths recorded: {lengths}"
            )
