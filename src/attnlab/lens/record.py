"""What was seen of a model's attention: by layer, head, step and call; kept in one file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.lens.where import Choice, chosen
from attnlab.statistics import Statistics

_PER_QUERY = ("entropy", "max", "distance", "sink_mass", "lse")
# Tokens before a grid that are taken for granted: a class token and registers. More than these must be said.
_PREFIX = 16

Kept = Tensor | Statistics | dict[str, Tensor]


@dataclass(eq=False)
class Entry:
    """One recorded call: which it was, and what was kept of it.

    heads: those that were kept, out of `total`; offset: the position of the first query; prefix: how many tokens come
    before the record's grid, None where distances are not on it.
    """

    name: str
    layer: int
    index: int
    step: int
    kind: str
    heads: tuple[int, ...]
    total: int
    nq: int
    nk: int
    offset: int
    prefix: int | None = None
    kept: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def continues(self, before: Entry) -> bool:
        """Whether its queries stand right behind those of `before`; in cross attention, one more to the same keys."""
        if (self.kind, self.heads, self.index) != (before.kind, before.heads, before.index):
            return False
        if self.kind == "self":
            return self.offset == before.offset + before.nq
        return self.nq == 1 and self.nk == before.nk


class Record:
    """Recorded attention, by layer and head: `record[3]`, `record[3, 5]`, `record["blocks.3.attn"]`, `record[-1]`.

    A layer is its ordinal in the model, a negative number counts from the last one recorded, and a name may be a glob
    that one layer matches. What comes is, over a batch B and the chosen heads H,

        weights     `(B, H, Nq, Nk)`
        outputs     `(B, H, Nq, Dv)`, before the output projection
        stats       `Statistics`, `(B, H, Nq)` per query and `(B, H, Nk)` per key

    or whatever a function kept; a head alone has no axis H. The steps of a generation become one matrix: its rows are
    the queries in order, keys that were not there yet have zeros. Passes that do not continue each other, and several
    calls of one module in a pass, are told apart by `step` and `call`.

    Attributes:
        what: "weights", "outputs", "stats", or "values" of a function.
        entries: every recorded call, in order.
        tokens: labels of the keys, one list, or one for each of the batch. grid, prefix: image tokens and how many
            come before them. sinks: how many first keys the sink mass of statistics counts. model: its class.
    """

    def __init__(
        self, what: str, entries: Sequence[Entry] = (), *, tokens: Sequence[Any] | None = None,
        grid: tuple[int, ...] | None = None, prefix: int | None = None, sinks: int = 1, model: str = "",
    ) -> None:  # fmt: skip
        self.what, self.entries, self.sinks, self.model = what, list(entries), sinks, model
        self.tokens = None if tokens is None else [t if isinstance(t, str) else list(t) for t in tokens]
        self.grid, self.prefix = None if grid is None else tuple(grid), prefix

    # What there is.

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the recorded layers, in the order of their ordinals."""
        return tuple(self._ordinals().values())

    @property
    def ordinals(self) -> tuple[int, ...]:
        """The recorded layers' places in the model, as `layers` has their names."""
        return tuple(self._ordinals())

    @property
    def heads(self) -> tuple[int, ...]:
        """Head numbers that were kept, of whichever layer."""
        return tuple(sorted({h for e in self.entries for h in e.heads}))

    @property
    def steps(self) -> tuple[int, ...]:
        """Passes over the model, or steps of a generation."""
        return tuple(sorted({e.step for e in self.entries}))

    @property
    def bytes(self) -> int:
        """Memory of what was kept."""
        return sum(x.numel() * x.element_size() for e in self.entries for x in e.kept.values())

    def _ordinals(self) -> dict[int, str]:
        return dict(sorted({e.layer: e.name for e in self.entries}.items()))

    def __len__(self) -> int:
        return len(self._ordinals())

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __contains__(self, layer: object) -> bool:
        return layer in self.layers or (isinstance(layer, int) and layer in self._ordinals())

    def __repr__(self) -> str:
        totals = sorted({len(e.heads) for e in self.entries})
        heads = "?" if not totals else str(totals[0]) if len(totals) == 1 else f"{totals[0]}–{totals[-1]}"
        lengths = sorted({e.nk for e in self.entries})
        keys = "" if not lengths else f", {lengths[0] if len(lengths) == 1 else f'{lengths[0]}–{lengths[-1]}'} keys"
        size, units = float(self.bytes), iter(("B", "KiB", "MiB", "GiB"))
        unit = next(units)
        while size >= 1024 and unit != "GiB":
            size, unit = size / 1024, next(units)
        of = f" of {self.model}" if self.model else ""
        passes = f"{len(self.steps)} step{'s' * (len(self.steps) != 1)}"
        return f"Record({self.what}{of}: {len(self)} layers × {heads} heads, {passes}{keys}, {size:.4g} {unit})"

    # What was kept.

    def __getitem__(self, key: int | str | tuple[int | str, Any]) -> Any:
        layer, head = key if isinstance(key, tuple) else (key, None)
        entries = self.of(layer)
        kept = self._join(entries)
        if head is None:
            return kept
        if isinstance(kept, dict) or (isinstance(kept, Tensor) and kept.shape[1:2] != (len(entries[0].heads),)):
            raise ValueError(f"what was kept of {entries[0].name} has no axis of heads: take record[{layer!r}]")
        return _take(kept, self._place(entries[0], head))

    def of(self, layer: int | str) -> list[Entry]:
        """The recorded calls of a layer, in order."""
        ordinal = self._ordinal(layer)
        return [e for e in self.entries if e.layer == ordinal]

    def step(self, step: int) -> Record:
        """What was recorded in one pass over the model, or one step of a generation; −1 is the last."""
        steps = self.steps
        if not isinstance(step, int) or (step not in steps and not -len(steps) <= step < 0):
            raise ValueError(f"step {step!r} was not recorded; those that were: {_listed(steps)}")
        step = steps[step] if step < 0 else step
        return self._with([e for e in self.entries if e.step == step])

    def call(self, index: int) -> Record:
        """What was recorded of each module's call number `index` within a pass: where one module is called again."""
        calls = sorted({e.index for e in self.entries})
        if index not in calls:
            raise ValueError(f"call {index!r} was not recorded; those that were: {_listed(calls)}")
        return self._with([e for e in self.entries if e.index == index])

    def stack(self) -> Any:
        """All layers in one: weights `(L, B, H, Nq, Nk)`; of statistics, each of them so; layers of one shape only."""
        self._require()
        kept = [self[name] for name in self.layers]
        shapes = {name: _shapes(k) for name, k in zip(self.layers, kept, strict=True)}
        if len({str(s) for s in shapes.values()}) > 1:
            told = "; ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise ValueError(f"layers of different shapes do not stack: {told}")
        if isinstance(kept[0], Tensor):
            return torch.stack(kept)
        if isinstance(kept[0], Statistics):
            return _statistics({n: torch.stack([getattr(k, n) for k in kept]) for n in _names(kept[0])})
        return {n: torch.stack([k[n] for k in kept]) for n in kept[0]}

    def measured(self, field: str | None, compute: Callable[[Tensor, dict[str, Any]], Tensor]) -> Tensor:
        """A measure of all layers, `(L, …)`: from statistics, or computed of weights. See `attnlab.lens.measures`."""
        self._require()
        if self.what == "stats" and field is not None:
            name, _, count = field.partition(":")
            if count and int(count) != self.sinks:
                raise ValueError(f"the mass of the first {self.sinks} keys was recorded, not that of {count}")
            found = [getattr(self[layer], name) for layer in self.layers]
        elif self.what == "weights":
            found = [compute(self[layer], self.where(layer)) for layer in self.layers]
        else:
            raise ValueError(f"this measure needs a record of weights (watch with keep='weights'), got {self.what}")
        if len({x.shape for x in found}) > 1:
            told = "; ".join(f"{n} {tuple(x.shape)}" for n, x in zip(self.layers, found, strict=True))
            raise ValueError(f"layers of different shapes do not stack, measure one at a time: {told}")
        return torch.stack(found)

    def where(self, layer: int | str) -> dict[str, Any]:
        """Where the tokens of a layer stand: its `grid`, the `prefix` before it, and the `offset` of the queries."""
        return self.where_of(self.of(layer)[0])

    def where_of(self, entry: Entry) -> dict[str, Any]:
        on = entry.prefix is not None
        return {"grid": self.grid if on else None, "prefix": entry.prefix or 0, "offset": entry.offset}

    def before(self, count: int) -> int | None:
        """How many of `count` tokens come before the grid; None where the grid does not fit them."""
        return tokens_before(count, self.grid, self.prefix)

    def on_grid(self, values: Tensor) -> Tensor:
        """Values of tokens `(…, N)` as a picture `(…, height, width)`, without the tokens that are not on the grid."""
        if self.grid is None:
            raise ValueError("this record has no grid: watch with grid=(height, width), or set record.grid")
        count, size = values.shape[-1], prod(self.grid)
        # Tokens that are generated come after the grid: it lies where it lay in the prompt.
        seen = {e.prefix for e in self.entries if e.prefix is not None and e.offset == 0 and count >= e.nk}
        first = seen.pop() if len(seen) == 1 else self.before(count)
        if first is None:
            raise ValueError(misfit(self.grid, self.prefix, [count]))
        return values[..., first : first + size].unflatten(-1, self.grid)

    # Finding it.

    def _require(self) -> None:
        if not self.entries:
            raise ValueError("nothing was recorded: run the model within `with watch(model) as record`")

    def _ordinal(self, layer: int | str) -> int:
        self._require()
        there = self._ordinals()
        if isinstance(layer, str):
            found = [i for i, name in there.items() if name == layer]
            found = found or [i for i, name in there.items() if fnmatchcase(name, layer)]
            if len(found) > 1:
                raise ValueError(f"layer {layer!r} is several: {', '.join(there[i] for i in found)}")
        elif isinstance(layer, int) and not isinstance(layer, bool):
            found = [layer] if layer in there else list(there)[layer:][:1] if -len(there) <= layer < 0 else []
        else:
            raise TypeError(f"a layer is an ordinal or a name, got {type(layer).__name__}")
        if not found:
            told = ", ".join(f"{i} {name}" for i, name in there.items())
            raise ValueError(f"layer {layer!r} was not recorded; those that were: {told}")
        return found[0]

    @staticmethod
    def _place(entry: Entry, head: Choice) -> int | list[int]:
        """Where the numbered heads are on the axis of heads."""
        numbers = chosen(head, entry.total, f"heads of {entry.name}:")
        missing = [h for h in numbers if h not in entry.heads]
        if missing:
            raise ValueError(
                f"heads {_listed(missing)} of {entry.name} were not recorded; those that were: {_listed(entry.heads)}"
            )
        found = [entry.heads.index(h) for h in numbers]
        return found[0] if isinstance(head, int) else found

    def _join(self, entries: list[Entry]) -> Kept:
        """What was kept of one layer, the steps of a generation as one."""
        if len(entries) > 1:
            name = entries[0].name
            if len({e.index for e in entries}) > 1:
                calls = _listed(sorted({e.index for e in entries}))
                raise ValueError(f"{name} was called several times in a pass: choose by record.call(…) among {calls}")
            steps = _listed(sorted({e.step for e in entries}))
            # What others did in a step tells a query that is generated from one that pools a new input.
            anew = {e.step for e in self.entries if e.kind == "self" and e.offset == 0}
            if not all(b.continues(a) and b.step not in anew for a, b in pairwise(entries)):
                raise ValueError(
                    f"passes over {name} do not continue each other: choose by record.step(…) among {steps}"
                )
            if self.what == "values":
                raise ValueError(f"values of {name} were kept in several steps: choose by record.step(…) among {steps}")
        joined = {n: _one(n, [e.kept[n] for e in entries]) for n in entries[0].kept}
        if self.what == "stats":
            return _statistics(joined)
        return joined[""] if list(joined) == [""] else joined

    def _with(self, entries: list[Entry]) -> Record:
        return Record(
            self.what, entries, tokens=self.tokens, grid=self.grid, prefix=self.prefix, sinks=self.sinks,
            model=self.model,
        )  # fmt: skip

    # Files.

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file, metadata included."""
        from attnlab.lens.storage import write

        write(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read what `save` wrote. ValueError says what is wrong with any other file."""
        from attnlab.lens.storage import read

        return read(path)


def tokens_before(count: int, grid: tuple[int, ...] | None, prefix: int | None) -> int | None:
    """How many of `count` tokens come before those on the grid: as said, or all others if they are few."""
    if grid is None:
        return None
    size = prod(grid)
    if prefix is not None:
        return prefix if prefix + size <= count else None
    return count - size if size <= count <= size + _PREFIX else None


def misfit(grid: tuple[int, ...], prefix: int | None, lengths: Sequence[int]) -> str:
    """Why no tokens lie on the grid."""
    said = f" after {prefix} tokens" if prefix is not None else ""
    more = "" if prefix is not None else f" (more than {_PREFIX} before it must be said: prefix=…)"
    return f"grid {' × '.join(map(str, grid))}{said} does not fit {_listed(lengths)} tokens{more}"


def _one(name: str, kept: Sequence[Tensor]) -> Tensor:
    """Steps as one: per query one after the other, keys padded with zeros, what keys received summed up."""
    if len(kept) == 1:
        return kept[0]
    if name in _PER_QUERY:
        return torch.cat(list(kept), -1)
    longest = max(x.shape[-1] for x in kept)
    padded = [F.pad(x, (0, longest - x.shape[-1])) for x in kept]
    return torch.stack(padded).sum(0) if name == "received" else torch.cat(padded, -2)


def _take(kept: Tensor | Statistics, at: int | list[int]) -> Tensor | Statistics:
    """Some of the heads, on the second axis."""
    if isinstance(kept, Tensor):
        return kept[:, at]
    return _statistics({n: getattr(kept, n)[:, at] for n in _names(kept)})


def _names(statistics: Statistics) -> list[str]:
    return [f.name for f in fields(Statistics) if getattr(statistics, f.name) is not None]


def _statistics(found: Mapping[str, Tensor]) -> Statistics:
    return Statistics(**{"out": None, **found})  # type: ignore[arg-type]


def _shapes(kept: Kept) -> Any:
    if isinstance(kept, Tensor):
        return tuple(kept.shape)
    if isinstance(kept, Statistics):
        return tuple(kept.entropy.shape), tuple(kept.received.shape)
    return {n: tuple(x.shape) for n, x in kept.items()}


def _listed(numbers: Sequence[int]) -> str:
    """Numbers to read: runs of three or more as "0–11"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{r[0]}–{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)
