"""What the results of a study say: one row per task and mechanism, and which one to use."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, field

from attnlab.arena.network import NONE
from attnlab.arena.store import Store, Study
from attnlab.arena.train import DONE


@dataclass
class Row:
    """One mechanism on one task, over its seeds."""

    task: str
    mechanism: str
    trials: list[dict]

    @property
    def scores(self) -> list[float]:
        return [trial["score"] for trial in self.trials if trial["status"] == DONE]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; unknown from one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def trouble(self) -> str:
        """What happened to the trials that gave no score."""
        return "; ".join(dict.fromkeys(f"{t['status']}: {t['reason']}" for t in self.trials if t["status"] != DONE))

    def first(self, name: str):
        """A field that is the same for all seeds."""
        return next((trial[name] for trial in self.trials if trial.get(name) is not None), None)

    def median(self, name: str) -> float | None:
        values = [trial[name] for trial in self.trials if trial.get(name) is not None]
        return statistics.median(values) if values else None

    def curve(self) -> list[tuple[int, float, float, float]]:
        """Step, mean loss, and the lowest and highest over seeds."""
        steps = defaultdict(list)
        for trial in self.trials:
            for step, loss in trial.get("curve") or []:
                steps[step].append(loss)
        return [(step, statistics.fmean(v), min(v), max(v)) for step, v in sorted(steps.items())]


@dataclass
class Answer:
    """Which mechanism to use on a task, as a sentence and as names."""

    sentence: str  # begins with what to use
    use: str = ""
    best: str = ""
    tied: list[str] = field(default_factory=list)  # as good as the best within the spread, the best included


@dataclass
class Summary:
    """A study and its results, in the order in which they are shown."""

    study: Study
    rows: dict[str, list[Row]]  # task → rows, the best first
    sweeps: list[dict]
    planned: int
    finished: int

    def row(self, task: str, mechanism: str) -> Row | None:
        return next((row for row in self.rows[task] if row.mechanism == mechanism), None)

    @property
    def mechanisms(self) -> list[str]:
        return self.study.settings["mechanisms"]

    @property
    def answers(self) -> dict[str, Answer]:
        return {task: answer(self.study.about[task], rows) for task, rows in self.rows.items()}


def summarise(store: Store, number: int | None = None) -> Summary:
    """The results that a study has so far."""
    study = store.study(number)
    results = store.results(study.plan)
    groups: dict[str, dict[str, list[dict]]] = {task: {} for task in study.about}
    for record in results.values():
        if record.get("task"):
            groups[record["task"]].setdefault(record["mechanism"], []).append(record)
    rows = {}
    for task, by_mechanism in groups.items():
        found = [Row(task, name, sorted(trials, key=lambda t: t["seed"])) for name, trials in by_mechanism.items()]
        rows[task] = sorted(found, key=lambda row: _rank(row, study.about[task]))
    sweeps = [record for record in results.values() if not record.get("task")]
    order = {name: i for i, name in enumerate(study.settings["mechanisms"])}
    sweeps.sort(key=lambda record: (record["layout"], order.get(record["mechanism"], 0)))
    return Summary(study, rows, sweeps, len(study.plan), len(results))


def sign(about: dict) -> int:
    """+1 where lower is better, -1 where higher is."""
    return 1 if about["better"] == "lower" else -1


def _rank(row: Row, about: dict) -> float:
    return math.inf if row.mean is None else sign(about) * row.mean


def answer(about: dict, rows: list[Row]) -> Answer:
    """The cheapest of those that are as good as the best within the spread over seeds."""
    scored = [row for row in rows if row.mean is not None]
    if not scored:
        return Answer(
            "no trial has finished yet" if not rows else "no mechanism came to a score; see the reasons above"
        )
    name, trivial = about["trivial"]
    best = scored[0]
    tied = [row for row in scored if row is best or as_good(row, best)]
    names = [row.mechanism for row in tied]
    if sign(about) * (_mean(best) - trivial) >= 0:
        return Answer(
            f"none: nothing learned more than {name} ({number(trivial)}) at this budget", NONE, best.mechanism, names
        )
    against = f"{name} has {number(trivial)}"
    if NONE in names:
        said = _score(next(row for row in tied if row.mechanism == NONE), about)
        better = (
            ""
            if best.mechanism == NONE
            else f"; {best.mechanism} ({number(_mean(best))}) is no better within the spread"
        )
        text = f"none: the network without any mechanism does as well here, {said}{better} ({against})"
        return Answer(text, NONE, best.mechanism, names)
    use = max(tied, key=lambda row: row.median("tokens_per_second") or 0.0)
    text = f"{use.mechanism}, {_score(use, about)} ({against})"
    if use is not best:
        speed = (use.median("tokens_per_second") or 0.0) / (best.median("tokens_per_second") or math.inf)
        text += (
            f": as good as {best.mechanism} ({number(_mean(best))}) within the spread, and trains {speed:.1f}× as fast"
        )
    elif len(tied) > 1:
        text += f": the best, and trains fastest of those as good ({', '.join(n for n in names if n != use.mechanism)})"
    else:
        behind = next((row for row in scored[1:] if row.mechanism != NONE), None)
        text += ": clearly the best" + (f"; next is {behind.mechanism} with {number(_mean(behind))}" if behind else "")
        if best.spread is None:
            text = text.replace("clearly the best", "the best of one seed each, so without knowing the spread")
    return Answer(text, use.mechanism, best.mechanism, names)


def as_good(row: Row, best: Row) -> bool:
    """Whether a row's mean is within the best one's spread over seeds; never claimed from one seed.

    Only the best one's spread counts: that another varies a lot does not make it good.
    """
    return best.spread is not None and abs(_mean(row) - _mean(best)) <= best.spread


def _mean(row: Row) -> float:
    return math.nan if row.mean is None else row.mean


def _score(row: Row, about: dict) -> str:
    return f"{score(row)} {about['metric']}"


def score(row: Row) -> str:
    """Mean ± spread, to the digit that the spread leaves certain: 29.95 ± 0.02."""
    if row.mean is None:
        return "–"
    if not row.spread:
        return number(row.mean, 4) + ("" if row.spread is None else " ± 0")
    places = max(0, -math.floor(math.log10(row.spread)))
    return f"{row.mean:,.{places}f} ± {row.spread:.{places}f}"


def whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def number(value: float | None, digits: int = 3) -> str:
    """A number as short as `digits` significant ones allow: 0.0312, 3.05, 29.9, 12,300."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(0, places)}f}"
