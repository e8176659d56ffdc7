"""What the results of a study say: one row per task and mechanism, and which one to use."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, field

from attnlab.arena.bench import Grid, find
from attnlab.arena.network import NONE
from attnlab.arena.store import Store, Study
from attnlab.arena.train import DIVERGED, DONE


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

    @property
    def diverged(self) -> bool:
        return any(trial["status"] == DIVERGED for trial in self.trials)

    @property
    def speed(self) -> float:
        """Training tokens per second."""
        return self.median("tokens_per_second") or 0.0

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
    measurements: list[dict] = field(default_factory=list)

    def row(self, task: str, mechanism: str) -> Row | None:
        return next((row for row in self.rows[task] if row.mechanism == mechanism), None)

    @property
    def mechanisms(self) -> list[str]:
        return self.study.settings["mechanisms"]

    @property
    def grids(self) -> dict[str, list[Grid]]:
        """The tables of each benchmark that was run."""
        names = dict.fromkeys(record["benchmark"] for record in self.measurements)
        found = {n: find(n).grids([r for r in self.measurements if r["benchmark"] == n]) for n in names}
        if self.rows and (of_trials := self.study.settings.get("benchmark")):  # one that reads trials, not cases
            found[of_trials] = find(of_trials).tables(self)  # type: ignore[attr-defined]
        return found

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
    measurements = [record for record in results.values() if record.get("benchmark")]
    sweeps = [record for record in results.values() if not record.get("task") and not record.get("benchmark")]
    order = {name: i for i, name in enumerate(study.settings["mechanisms"])}
    sweeps.sort(key=lambda record: (record["layout"], order.get(record["mechanism"], 0)))
    return Summary(study, rows, sweeps, len(study.plan), len(results), measurements)


def sign(about: dict) -> int:
    """+1 where lower is better, -1 where higher is."""
    return 1 if about["better"] == "lower" else -1


def _rank(row: Row, about: dict) -> float:
    return math.inf if row.mean is None else sign(about) * row.mean


def answer(about: dict, rows: list[Row]) -> Answer:
    """The cheapest of those that are as good as the best within the spread over seeds.

    A mechanism that diverged with some seed is used only if all did.
    """
    scored = [row for row in rows if row.mean is not None]
    scored = [row for row in scored if not row.diverged] or scored
    if not scored:
        return Answer("no mechanism came to a score; see the reasons above" if rows else "no trial has finished yet")
    best = scored[0]
    tied = {row.mechanism: row for row in scored if row is best or as_good(row, best)}
    name, trivial = about["trivial"]
    if sign(about) * (_mean(best) - trivial) >= 0:
        use, why = NONE, f"nothing learned more than {name} ({number(trivial)}) at this budget"
    elif NONE in tied:
        use, why = NONE, f"the network without any mechanism does as well here, {_score(tied[NONE], about)}"
        if best.mechanism != NONE:
            why += f"; {best.mechanism} ({number(best.mean)}) is no better within the spread"
    else:
        use = max(tied, key=lambda mechanism: tied[mechanism].speed)
        why = (
            f"{_score(tied[use], about)} ({name} has {number(trivial)}): {_reason(tied[use], best, list(tied), scored)}"
        )
    return Answer(f"{use}, {why}" if use != NONE else f"{use}: {why}", use, best.mechanism, list(tied))


def _reason(use: Row, best: Row, tied: list[str], scored: list[Row]) -> str:
    if use is not best:
        times = use.speed / best.speed if best.speed else math.inf
        return f"as good as {best.mechanism} ({number(best.mean)}) within the spread, and trains {times:.1f}× as fast"
    if len(tied) > 1:
        others = ", ".join(mechanism for mechanism in tied if mechanism != use.mechanism)
        return f"the best, and trains fastest of those as good ({others})"
    behind = next((row for row in scored if row.mechanism not in (NONE, best.mechanism)), None)
    sure = "clearly the best" if best.spread is not None else "the best of one seed each, so without knowing the spread"
    return sure + (f"; next is {behind.mechanism} with {number(behind.mean)}" if behind else "")


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
