"""A study as it runs: bars and the remaining time in a terminal, one line per result elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from statistics import fmean
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from attnlab.arena.jobs import MEASURE, TRIAL, Job
from attnlab.arena.pool import Event
from attnlab.arena.summary import number

_A_GUESS = 5.0  # seconds of a job, before any has ended


class Live:
    """`with Live(jobs, workers, console) as live: run(..., watch=live)`."""

    def __init__(self, jobs: Sequence[Job], workers: int, console: Console):
        self.forecast = Forecast(jobs, workers)
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self.whole = self.bars.add_task("[bold]study", total=1.0, note="")
        self.running: dict[str, TaskID] = {}

    def __enter__(self) -> Live:
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()

    def __call__(self, event: Event) -> None:
        self.forecast.note(event)
        name = event.job.key
        if event.record is None:
            if name not in self.running:
                self.running[name] = self.bars.add_task(label(event.job), total=1.0, note="")
            self.bars.update(self.running[name], completed=event.fraction)
        else:
            if name in self.running:
                self.bars.remove_task(self.running.pop(name))
            self._tell(event)
        done, total = self.forecast.done, self.forecast.total
        note = f"{done}/{total}, {clock(self.forecast.remaining())} left"
        self.bars.update(self.whole, completed=self.forecast.share(), note=note)

    def _tell(self, event: Event) -> None:
        record = event.record or {}
        if self.console.is_terminal and record["status"] == "done":
            return
        score = f" {number(record['score'])}" if record.get("score") is not None else ""
        trouble = f": {record['reason']}" if record.get("reason") else ""
        done, total = self.forecast.done, self.forecast.total
        left = f"[{done}/{total}, {clock(self.forecast.remaining())} left]"
        line = f"{left} {label(event.job)}: {record['status']}{score}{trouble}"
        self.console.print(Text(line), soft_wrap=True)


class Forecast:
    """How much time a study still needs, from how long its jobs took so far.

    A job is expected to take as long as the finished ones of the same task and mechanism; before there are any, of the
    same task, and then of any.
    """

    def __init__(self, jobs: Sequence[Job], workers: int):
        self.left = {job.key: job for job in jobs}
        self.total, self.done, self.workers = len(self.left), 0, max(1, workers)
        self.begun: dict[str, float] = {}
        self.fractions: dict[str, float] = {}
        self.took: dict[tuple[str, str, str], list[float]] = {}

    def note(self, event: Event, now: float | None = None) -> None:
        now = time.monotonic() if now is None else now
        key = event.job.key
        if event.fraction:  # not when it was handed out: a worker that starts reads its data first
            self.begun.setdefault(key, now)
        self.fractions[key] = event.fraction
        if event.record is not None and key in self.left:
            del self.left[key]
            self.done += 1
            took = event.record.get("seconds") or now - self.begun[key]
            self.took.setdefault(_group(event.job), []).append(took)

    def expected(self, job: Job) -> float:
        kind, task, mechanism = _group(job)
        for wanted in ((kind, task, mechanism), (kind, task, None), (kind, None, None), (None, None, None)):
            times = [
                seconds
                for group, all_seconds in self.took.items()
                if all(w is None or w == g for w, g in zip(wanted, group, strict=True))
                for seconds in all_seconds
            ]
            if times:
                return fmean(times)
        return _A_GUESS

    def remaining(self) -> float:
        seconds = 0.0
        for key, job in self.left.items():
            side_by_side = self.workers if job.kind == TRIAL else 1
            seconds += self.expected(job) * (1 - self.fractions.get(key, 0.0)) / side_by_side
        return seconds

    def share(self) -> float:
        """How much of the expected time is over."""
        spent = sum(self.expected(job) * self.fractions.get(key, 0.0) for key, job in self.left.items())
        spent += sum(sum(times) for times in self.took.values())
        ahead = sum(self.expected(job) * (1 - self.fractions.get(key, 0.0)) for key, job in self.left.items())
        return spent / (spent + ahead) if spent + ahead else 1.0


def _group(job: Job) -> tuple[str, str, str]:
    return job.kind, job.task or job.layout, job.mechanism


def label(job: Job) -> str:
    if job.kind == TRIAL:
        return f"{job.task} · {job.mechanism} · seed {job.seed}"
    if job.kind == MEASURE:
        case = json.loads(job.case)
        return f"{job.benchmark} · {next(iter(case.values()))} · {job.mechanism}"
    return f"cost · {job.mechanism} · {job.layout}"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
