"""The report: one HTML page that needs no network and no scripts, with the data beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from attnlab import cards
from attnlab.arena import charts, export, influence, tables
from attnlab.arena.bench import find
from attnlab.arena.charts import Series
from attnlab.arena.memory import as_text
from attnlab.arena.network import NONE
from attnlab.arena.summary import Row, Summary, number, score, sign, whole

PAGE = "index.html"
_MARK = "<!-- attnlab report -->"  # how we know our own pages again
_COLOURS = 12


def write(summary: Summary, folder: Path | str, *, force: bool = False) -> Path:
    """Writes index.html, trials.csv, sweeps.csv, measurements.csv and results.json into `folder`; gives the page.

    A folder that exists is refused, unless `force`: then these files are replaced and nothing else is touched.
    """
    folder = Path(folder)
    check(folder, force=force)
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        PAGE: page(summary),
        "trials.csv": export.trials_csv(summary),
        "sweeps.csv": export.sweeps_csv(summary),
        "measurements.csv": export.measurements_csv(summary),
        "results.json": export.as_json(summary),
    }
    for name, text in files.items():
        unfinished = folder / f".{name}.part"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, folder / name)  # so that a reader never sees half a page
    return folder / PAGE


def check(folder: Path, *, force: bool = False) -> None:
    """Raises where `write` would refuse."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"out: {folder} is a file; a folder for the report is wanted")
    if folder.exists() and any(folder.iterdir()) and not force:
        raise FileExistsError(f"out: {folder} exists; choose another folder, or replace its report with --force")


def is_ours(folder: Path) -> bool:
    """Whether a folder holds a report that we wrote."""
    page = folder / PAGE
    return page.is_file() and _MARK in page.read_text(encoding="utf-8", errors="replace")[:200]


@dataclass
class _Section:
    """What the page shows of one task."""

    name: str
    about: dict
    answer: str
    rows: list[Row]
    tied: list[str]
    use: str
    fronts: list[str]
    curves: str
    details: list[_Table]


@dataclass
class _Table:
    """Numbers behind a metric: a row per mechanism; `shades` are 0 to 1, for the background."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[tuple[float, float]]]]


def page(summary: Summary) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attnlab.arena", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        number=number, whole=whole, score=score, bytes=lambda value: "–" if value is None else as_text(value)
    )
    colours = {name: i % _COLOURS for i, name in enumerate(summary.mechanisms)}
    return environment.get_template("report.html.j2").render(
        mark=_MARK,
        control=NONE,
        summary=summary,
        study=summary.study,
        colours=colours,
        sections=[_section(summary, task, colours) for task in summary.rows],
        sweeps=_sweep_charts(summary, colours),
        benchmarks=_benchmarks(summary),
        pictures=_pictures(summary) if summary.rows else [],
        left_out=_left_out(summary),
        decode_at=sorted({int(at) for sweep in summary.sweeps for at in sweep.get("decode") or ()}),
    )


def _benchmarks(summary: Summary) -> list[dict]:
    return [
        {"name": name, "title": find(name).TITLE, "grids": grids, "reasons": tables.reasons(summary, name)}
        for name, grids in summary.grids.items()
    ]


def _section(summary: Summary, task: str, colours: dict[str, int]) -> _Section:
    about, rows, answer = summary.study.about[task], summary.rows[task], summary.answers[task]
    metric = f"{about['metric']} ({about['better']} is better)"
    fronts = []
    for x_label, cost in (
        ("training time, µs per token", lambda row: 1e6 / row.median("tokens_per_second")),
        ("FLOPs per token, forward", lambda row: row.first("flops_per_token")),
    ):
        dots = []
        for row in rows:
            if row.mean is not None and row.median("tokens_per_second") and cost(row):
                point, spread = (cost(row), row.mean), [row.spread] if row.spread else []
                dots.append(Series(row.mechanism, colours[row.mechanism], [point], spread=spread))
        fronts.append(
            charts.front_chart(dots, x_label, metric, lower=sign(about) > 0, baseline=tuple(about["trivial"]))
        )
    lines = []
    for row in rows:
        curve = row.curve()
        band = [(step, low, high) for step, _, low, high in curve] if len(row.trials) > 1 else []
        lines.append(Series(row.mechanism, colours[row.mechanism], [(step, mean) for step, mean, *_ in curve], band))
    curves = charts.line_chart(lines, "step", "training loss")
    return _Section(task, about, answer.sentence, rows, answer.tied, answer.use, fronts, curves, _details(rows))


def _details(rows: list[Row]) -> list[_Table]:
    """The named numbers of the trials, averaged over seeds."""
    names = dict.fromkeys(name for row in rows for trial in row.trials for name in trial.get("details") or ())
    tables = []
    for name in names:
        flat = {
            row.mechanism: _average([_flat(t["details"][name]) for t in row.trials if t.get("details")]) for row in rows
        }
        flat = {mechanism: values for mechanism, values in flat.items() if values}
        columns = list(dict.fromkeys(column for values in flat.values() for column in values))
        if not columns:
            continue
        every = [value for values in flat.values() for value in values.values()]
        low, span = min(every), (max(every) - min(every)) or 1.0
        shaded = [
            (mechanism, [(values.get(c, float("nan")), (values.get(c, low) - low) / span) for c in columns])
            for mechanism, values in flat.items()
        ]
        tables.append(_Table(name, columns, shaded))
    return tables


def _flat(value: object, prefix: str = "") -> dict[str, float]:
    """Nested numbers by their path: {"128": [0.9, 1.0]} → {"128 · 1": 0.9, "128 · 2": 1.0}."""
    if isinstance(value, (int, float)):
        return {prefix or "value": float(value)}
    pairs = value.items() if isinstance(value, dict) else enumerate(value, 1) if isinstance(value, list) else ()
    return {name: v for key, x in pairs for name, v in _flat(x, f"{prefix} · {key}" if prefix else str(key)).items()}


def _average(many: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(one[name] for one in many) / len(many) for name in many[0]} if many else {}


def _sweep_charts(summary: Summary, colours: dict[str, int]) -> list[tuple[str, ...]]:
    """For each layout: latency and memory over lengths."""
    found: list[tuple[str, ...]] = []
    for layout in dict.fromkeys(sweep["layout"] for sweep in summary.sweeps):
        drawn = []
        for quantity, scale, label in (("seconds", 1e3, "latency, ms"), ("memory", 2**-20, "peak memory, MiB")):
            series = [
                Series(
                    s["mechanism"],
                    colours[s["mechanism"]],
                    [(p["length"], scale * p[quantity]) for p in s["points"] if p[quantity]],
                )
                for s in summary.sweeps
                if s["layout"] == layout and s.get("points")
            ]
            drawn.append(
                charts.line_chart([s for s in series if s.points], "tokens", label, log_x=True, log_y=True, marks=True)
            )
        found.append((layout, *drawn))
    return found


def _pictures(summary: Summary) -> list[dict]:
    """Who sees whom, for every mechanism that is at hand here."""
    found = []
    known = set(cards.names())
    for name in summary.mechanisms:
        if name == NONE or name not in known:
            continue
        card = cards.describe(name)
        try:
            strength = influence.influence(name)
        except Exception:  # a mechanism that fails has its row of reasons, and the page goes on
            continue
        found.append(
            {"name": name, "card": card, "layout": influence.layout_of(card), "png": influence.as_png(strength)}
        )
    return found


def _left_out(summary: Summary) -> list[tuple[str, str, str]]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for task, mechanism, reason in summary.study.left_out:
        reasons.setdefault((mechanism, reason), []).append(task)
    return [(mechanism, ", ".join(tasks), reason) for (mechanism, reason), tasks in reasons.items()]
