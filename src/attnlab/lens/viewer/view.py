"""What a page of attention shows, and how it is written."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnlab.lens.record import Record, tokens_before
from attnlab.lens.viewer.pack import BUDGET, Layout, Places, layouts, pack, quantised

_THUMB = 24  # a matrix in the overview is at most so many pixels wide
_SCRIPTS = ("decode.js", "charts.js", "overview.js", "head.js", "analytics.js", "main.js")


@dataclass(frozen=True)
class Tokens:
    """The tokens that queries or keys are: `labels` to show, and where they lie on an image if they do.

    `grid` (rows, columns) of patches begins at token `start`; `image` is a data URL of what is seen there. Labels may
    be left out: tokens are then called by their number, patches by row and column.
    """

    count: int
    labels: tuple[str, ...] | None = None
    grid: tuple[int, int] | None = None
    start: int = 0
    image: str | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != self.count:
            raise ValueError(f"labels must be {self.count}, one for each token, got {len(self.labels)}")
        if self.grid is not None and self.start + math.prod(self.grid) > self.count:
            raise ValueError(f"grid {self.grid} from token {self.start} on does not fit {self.count} tokens")
        if self.image is not None and not self.image.startswith("data:image/"):
            raise ValueError("image must be a data URL (data:image/png;base64,…)")

    @property
    def places(self) -> Places:
        return Places(self.count, self.grid, self.start)

    def name(self, token: int) -> str:
        if self.labels is not None:
            return self.labels[token]
        inside = token - self.start
        if self.grid is None or not 0 <= inside < math.prod(self.grid):
            return f"token {token}"
        return f"row {inside // self.grid[1]}, column {inside % self.grid[1]}"


@dataclass(frozen=True)
class Measure:
    """A number for each head, `values[layer][head]` (NaN where there is none), with its unit and what it says."""

    name: str
    values: Sequence[Sequence[float]]
    unit: str = ""
    about: str = ""


@dataclass(eq=False)
class View:
    """A page in the making: `View(shapes)`, `add` each layer in turn, put measures and analytics in, `write`.

    Layers come one at a time, so that no more than one layer's matrices need be in memory.
    """

    shapes: Sequence[tuple[int, Tokens, Tokens]]  # of each layer: heads, queries, keys
    title: str = "attention"
    facts: Mapping[str, str] = field(default_factory=dict)  # model, input, …: shown under the title
    notes: Sequence[str] = ()  # what a reader must know: random weights, what was cut
    measures: list[Measure] = field(default_factory=list)
    analytics: Mapping[str, Any] | None = None
    budget: int = BUDGET
    layers: list[dict[str, Any]] = field(default_factory=list)
    blobs: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.shapes:
            raise ValueError("there is no layer to show")
        self.layouts: list[Layout] = layouts([(h, q.places, k.places) for h, q, k in self.shapes], self.budget)
        self.tokens: list[Tokens] = list(dict.fromkeys(t for _, q, k in self.shapes for t in (q, k)))

    @classmethod
    def of(cls, weights: Tensor | Sequence[Tensor], tokens: Tokens | None = None, **about: Any) -> View:
        """A page over `weights (L, H, N, N)`, or a sequence of `(H, N, N)`: queries and keys are the same tokens."""
        listed = list(weights)
        if any(w.ndim != 3 or w.shape[1] != w.shape[2] for w in listed):
            raise ValueError(f"weights must be (L, H, N, N), got layers of {[tuple(w.shape) for w in listed]}")
        spaces = [Tokens(w.shape[-1]) if tokens is None else tokens for w in listed]
        view = cls([(len(w), t, t) for w, t in zip(listed, spaces, strict=True)], **about)
        for i, w in enumerate(listed):
            view.add(f"layer {i}", w)
        return view

    @classmethod
    def of_record(cls, record: Record, *, sample: int = 0, image: str | None = None, **about: Any) -> View:
        """A page over one sample of a record of weights, with its labels and grid; `image` as a data URL."""
        if record.what != "weights":
            raise ValueError(f"record must hold weights (watch with keep='weights'), and this one holds {record.what}")
        given = record.tokens or []
        labels = given if not given or isinstance(given[0], str) else given[sample]

        def tokens(count: int) -> Tokens:
            before = tokens_before(count, record.grid, record.prefix)
            grid = (record.grid[0], record.grid[1]) if record.grid is not None and len(record.grid) == 2 else None
            named = tuple(map(str, labels)) if len(labels) == count else None
            if before is None or grid is None:
                return Tokens(count, named)
            return Tokens(count, named, grid, before, image)

        maps = [record[ordinal][sample] for ordinal in record.ordinals]
        view = cls([(len(w), tokens(w.shape[1]), tokens(w.shape[2])) for w in maps], **{"title": record.model, **about})
        for ordinal, weights in zip(record.ordinals, maps, strict=True):
            entry = record.of(ordinal)[0]
            view.add(entry.name, weights, number=ordinal, heads=entry.heads)
        return view

    def add(
        self, name: str, weights: Tensor, *, number: int | None = None, heads: Sequence[int] = (), note: str = ""
    ) -> None:
        """The next layer: `weights (H, Nq, Nk)`, rows of sum one; `number` and `heads` as the model counts them."""
        at = len(self.layers)
        if at == len(self.shapes):
            raise ValueError(f"there are {len(self.shapes)} layers, and {name} is one too many")
        count, queries, keys = self.shapes[at]
        if weights.shape != (count, queries.count, keys.count):
            wanted = (count, queries.count, keys.count)
            raise ValueError(f"weights of {name} must be {wanted}, got {tuple(weights.shape)}")
        if not torch.isfinite(weights).all():
            raise ValueError(f"weights of {name} are not finite")
        layout = self.layouts[at]
        packed, kept = pack(weights, layout)
        weights = weights.detach().float().cpu()
        small = F.adaptive_avg_pool2d(weights, (min(_THUMB, queries.count), min(_THUMB, keys.count)))
        thumbs, _ = quantised(small.flatten(1))
        received, received_max = quantised(weights.mean(1))
        self.layers.append(
            {
                "name": name,
                "number": at if number is None else number,
                "heads": list(heads) or list(range(count)),
                "q": self.tokens.index(queries),
                "k": self.tokens.index(keys),
                "rows": layout.rows // layout.heads,
                "groups": layout.groups,
                "top": layout.top,
                "queryWidth": layout.query_width,
                "keyWidth": layout.key_width,
                "kept": round(kept, 4),
                "thumb": [small.shape[1], small.shape[2], _text(thumbs)],
                "received": [received_max, _text(received)],
                "note": note,
            }
        )
        self.blobs.append(packed)

    def html(self) -> str:
        """The page, as text."""
        import jinja2

        if len(self.layers) != len(self.shapes):
            raise ValueError(f"{len(self.layers)} of {len(self.shapes)} layers have been added")
        for measure in self.measures:
            lengths = [len(row) for row in measure.values]
            if lengths != [count for count, _, _ in self.shapes]:
                raise ValueError(f"measure {measure.name!r} must have a number for each head, got {lengths}")
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("attnlab.lens.viewer", "page"), autoescape=True, trim_blocks=True
        )

        def source(name: str) -> str:
            return environment.loader.get_source(environment, name)[0]  # type: ignore[union-attr]

        return environment.get_template("page.html.j2").render(
            title=self.title,
            style=source("style.css"),
            scripts=[source(name) for name in _SCRIPTS],
            data=_json(self._data()),
            blobs=[_text(blob) for blob in self.blobs],
        )

    def write(self, path: str | Path) -> Path:
        """Writes the page to `path`, whole or not at all."""
        path = Path(path)
        if path.is_dir():
            raise IsADirectoryError(f"out: {path} is a folder; a file such as page.html is wanted")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.part")
        unfinished.write_text(self.html(), encoding="utf-8")
        os.replace(unfinished, path)
        return path

    def _data(self) -> dict[str, Any]:
        images = list(dict.fromkeys(t.image for t in self.tokens if t.image is not None))
        spaces = []
        for t in self.tokens:
            image = None if t.image is None else images.index(t.image)
            spaces.append({"count": t.count, "labels": t.labels, "grid": t.grid, "start": t.start, "image": image})
        return {
            "title": self.title,
            "facts": dict(self.facts),
            "notes": [*self.notes, *self._kept()],
            "spaces": spaces,
            "images": images,
            "layers": self.layers,
            "queryGroups": [self._groups(layout.queries, layout.query_width) for layout in self.layouts],
            "keyGroups": [self._groups(layout.keys, layout.key_width) for layout in self.layouts],
            "measures": [
                {"name": m.name, "unit": m.unit, "about": m.about, "values": [list(map(_number, r)) for r in m.values]}
                for m in self.measures
            ],
            "analytics": self.analytics,
        }

    @staticmethod
    def _groups(places: Places, width: int) -> list[int] | None:
        return None if width == 1 else places.groups(width)

    def _kept(self) -> list[str]:
        """What was cut to make the page small, in words."""
        cut = [(x, layer) for x, layer in zip(self.layouts, self.layers, strict=True) if not x.whole]
        if not cut:
            return []
        layout, _ = max(cut, key=lambda x: x[0].bytes)
        kept = [layer["kept"] for _, layer in cut]
        where = f"{layout.key_width}×{layout.key_width} patches" if self._on_grid() else f"{layout.key_width} tokens"
        note = (
            f"To keep the page small, each row holds its {layout.top} strongest keys one by one "
            f"({' to '.join(dict.fromkeys(f'{x:.0%}' for x in (min(kept), max(kept))))} of the attention, by layer); "
            f"all other keys share the mean over {where}."
        )
        if layout.query_width > 1:
            rows = (
                f"{layout.query_width}×{layout.query_width} patches"
                if self._on_grid()
                else f"{layout.query_width} tokens"
            )
            note += f" Queries of {rows} share a row."
        return [note + " Measures and overview pictures are of the full matrices."]

    def _on_grid(self) -> bool:
        return any(t.grid is not None for t in self.tokens)


def _number(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _json(data: Any) -> str:
    """JSON that can stand in a script element, whatever the labels hold."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
