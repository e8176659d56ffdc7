"""A study: every chosen mechanism on every chosen task with every seed, planned, run, resumed."""

from __future__ import annotations

import json
import platform
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from attnlab import __version__, cards
from attnlab.arena import bench, cluster, jobs, measure
from attnlab.arena.jobs import Job
from attnlab.arena.network import NONE, refuses, takes_part
from attnlab.arena.pool import Event, cores, perform, side_by_side
from attnlab.arena.store import Store, Study
from attnlab.arena.task import CAUSAL, GRID, SELF, Task, find_task, tasks

MECHANISMS = ("multihead", "gated", "sliding_window", "power", "linear", "kda", "neighborhood", "agent", "focal")
_PACKAGES = ("torch", "numpy", "scikit-image", "statsmodels")
_FINAL = ("done", "diverged")  # a failed or refused job is tried again by the same command


@dataclass
class Plan:
    """What will be done, what takes no part and why, and what the tasks are about."""

    trials: list[Job]
    sweeps: list[Job]
    left_out: list[list[str]]  # task, mechanism, reason
    about: dict[str, dict]  # task → title, metric, better, layout, trivial
    settings: dict
    load: list[str] = field(default_factory=list)
    measurements: list[Job] = field(default_factory=list)

    @property
    def jobs(self) -> list[Job]:
        return self.trials + self.sweeps + self.measurements

    def __add__(self, other: Plan) -> Plan:
        """Both, the settings of the first, with the other's mechanisms."""
        mechanisms = list(dict.fromkeys(self.settings["mechanisms"] + other.settings["mechanisms"]))
        return Plan(
            self.trials + other.trials, self.sweeps + other.sweeps, self.left_out + other.left_out,
            {**self.about, **other.about}, {**self.settings, "mechanisms": mechanisms}, self.load + other.load,
            self.measurements + other.measurements,
        )  # fmt: skip


def plan(
    names_of_tasks: Sequence[str] = (),
    mechanisms: Sequence[str] = (),
    *,
    seeds: int = 3,
    budget: str = "small",
    data: Path | str | None = None,
    device: str = "",
    load: Sequence[Path | str] = (),
) -> Plan:
    """Reads the data and lists the jobs. Unknown names and missing packages of what was asked for are errors."""
    if seeds < 1:
        raise ValueError(f"seeds: {seeds} is not a number of seeds; at least 1 is wanted")
    if budget not in measure.LENGTHS:
        raise ValueError(f"budget: {budget!r} is not one of {', '.join(measure.LENGTHS)}")
    device = device_of(device)
    jobs.load_files(load)
    left_out: list[list[str]] = []
    chosen = _tasks(names_of_tasks, budget, data, left_out)
    return lay_out(
        chosen, contestants(mechanisms), seeds=seeds, budget=budget, data=data, device=device, load=load,
        left_out=left_out,
    )  # fmt: skip


def lay_out(
    chosen: Sequence[Task], names: Sequence[str], *, seeds: int, budget: str, data: Path | str | None,
    device: str, load: Sequence[Path | str], left_out: list[list[str]], **settings: Any,
) -> Plan:  # fmt: skip
    """The trials of the contestants on tasks that are loaded, and the sweeps of those that have a trial."""
    trials, layouts = [], set()
    for task in chosen:
        for name in names:
            if reason := takes_part(name, type(task)) or refuses(name, task):
                left_out.append([task.name, name, reason])
    out = {(task, name) for task, name, _ in left_out}
    for seed in range(seeds):  # seed by seed, so that an interrupted study has something to say about all
        for task in chosen:
            for name in names:
                if (task.name, name) in out:
                    continue
                trials.append(jobs.trial(task, name, seed, budget, device))
                if task.layout in (CAUSAL, GRID, SELF):  # cross attention costs what self attention does
                    layouts.add((name, task.layout))
    if not any(job.mechanism != NONE for job in trials):
        reasons = "; ".join(f"{name} on {task}: {reason}" for task, name, reason in left_out)
        raise ValueError(f"mechanisms: none of them can do any of the tasks. {reasons}")
    sweeps = [jobs.sweep(name, layout, budget, device, cores()) for name, layout in sorted(layouts) if name != NONE]
    settings |= {
        "tasks": [task.name for task in chosen],
        "mechanisms": list(names),
        "seeds": seeds,
        "budget": budget,
        "data": None if data is None else str(data),
        "device": device,
    }
    about = {task.name: _about(task) for task in chosen}
    return Plan(trials, sweeps, left_out, about, settings, [str(Path(path)) for path in load])


def plan_benchmark(name: str, *, budget: str = "small", device: str = "", **options: Any) -> Plan:
    """The cases of the benchmark `name` (`attnlab.arena.bench`), measured one at a time with the machine to itself."""
    device = device_of(device)
    cases = bench.find(name).cases(budget, **options)
    if not cases:
        raise ValueError(f"{name}: nothing is left to measure")
    jobs_ = [jobs.measurement(name, case, budget, device, cores()) for case in cases]
    settings = {
        "benchmark": name, "tasks": [], "mechanisms": list(dict.fromkeys(job.mechanism for job in jobs_)), "seeds": 1,
        "budget": budget, "data": None, "device": device,
    }  # fmt: skip
    return Plan([], [], [], {}, settings, measurements=jobs_)


def device_of(name: str) -> str:
    """The device asked for, or the GPU if there is one."""
    has_gpu = torch.cuda.is_available()
    kind = name.split(":")[0]
    if kind not in ("", "cpu", "cuda") or (kind == "cuda" and not has_gpu):
        raise ValueError(f"device: {name!r} is not here; {'cpu or cuda' if has_gpu else 'cpu'} is")
    return name or ("cuda" if has_gpu else "cpu")


def _about(task: Task) -> dict:
    """What a reader of the results needs to know of a task, also where the task itself is not at hand."""
    return {
        "title": task.title,
        "metric": task.metric,
        "better": task.better,
        "layout": task.layout,
        "positions": task.positions,
        "trivial": list(task.trivial()),
        **asdict(task.budget),
    }


def _tasks(names: Sequence[str], budget: str, data: Path | str | None, left_out: list[list[str]]) -> list[Task]:
    known = tasks()
    reads = "" if data is None else _what(Path(data))
    if not names:
        wanted = [cls for cls in known.values() if budget in cls.budgets and (not reads or cls.reads == reads)]
    else:
        wanted = [find_task(name) for name in dict.fromkeys(names)]
        if reads and not any(cls.reads == reads for cls in wanted):
            able = [cls.name for cls in known.values() if cls.reads == reads]
            raise ValueError(f"data: none of the tasks {', '.join(names)} reads {reads}; {' and '.join(able)} would")
    loaded = []
    for cls in wanted:
        try:
            loaded.append(cls(budget, data if cls.reads == reads else None) if reads else cls(budget))
        except ImportError as error:
            if names:
                raise
            left_out.append([cls.name, "all", str(error)])
    return loaded


def _what(path: Path) -> str:
    if not path.exists():
        raise FileNotFoundError(f"data: {path} does not exist; a folder of images or a text file is wanted")
    return "images" if path.is_dir() else "text"


def contestants(mechanisms: Sequence[str], default: Sequence[str] = MECHANISMS) -> list[str]:
    """The control first, then the mechanisms asked for, or the default ones."""
    if not mechanisms:
        known = cards.names()
        return [NONE, *(name for name in default if name in known)]
    names = list(dict.fromkeys(mechanisms))
    for name in names:
        if name != NONE:
            cards.describe(name)  # unknown names are errors that know better ones
    return [NONE, *(name for name in names if name != NONE)]


def run(
    plan: Plan,
    store: Store,
    *,
    command: str = "",
    workers: int | None = None,
    ray: str | None = None,
    watch: Callable[[Event], None] = lambda event: None,
) -> Study:
    """Does what the store does not hold yet: trials side by side, then sweeps with the machine to themselves.

    With `ray`, the address of a Ray cluster or "local", the trials are spread over it; the sweeps, whose costs are
    compared, stay on this machine.
    """
    study = Study(
        0,
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command,
        plan.settings,
        versions(plan.settings["device"]),
        [job.key for job in plan.jobs],
        plan.left_out,
        plan.about,
    )
    number = store.begin(study)
    workers = side_by_side(plan.settings["device"]) if workers is None else workers

    # One thread per trial, however many run: the numbers must not depend on the machine's number of cores.
    def trials() -> Iterator[Event]:
        todo = missing(plan.trials, store)
        if ray is None or not todo:
            yield from perform(todo, workers=workers, threads=1, load=plan.load)
            return
        leave = cluster.connect(ray, workers)
        try:
            yield from cluster.perform(todo, threads=1, load=plan.load)
        finally:
            leave()

    def sweeps() -> Iterator[Event]:
        todo = missing(plan.sweeps + plan.measurements, store)
        yield from perform(todo, workers=min(workers, 1), threads=cores(), load=plan.load)

    for event in chain(trials(), sweeps()):
        if event.record is not None:
            store.save(event.job.key, event.job.kind, event.record)
        watch(event)
    return store.study(number)


def missing(wanted: Sequence[Job], store: Store) -> list[Job]:
    """The jobs without a result that lasts."""
    have = store.results()
    return [job for job in wanted if have.get(job.key, {}).get("status") not in _FINAL]


def versions(device: str) -> dict[str, str]:
    """What a reader needs to do it again."""
    found = {"attnlab": __version__, "python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["machine"] = f"{platform.system()} {platform.machine()}, {cores()} cores"
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def command_line() -> str:
    """The command as it was given, for the report."""
    return " ".join([Path(sys.argv[0]).name, *(json.dumps(a) if " " in a else a for a in sys.argv[1:])])
