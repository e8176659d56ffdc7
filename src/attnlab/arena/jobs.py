"""The jobs of a study, and the key under which a job's result is kept.

A key is made of everything that the result depends on: the same command finds its results again, and a mechanism whose
source, options or data changed runs anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from attnlab import __version__, cards
from attnlab.arena import ends, measure, network, train
from attnlab.arena.network import NONE
from attnlab.arena.task import Task, find_task

TRIAL, SWEEP, MEASURE = "trial", "sweep", "measure"


@dataclass(frozen=True)
class Job:
    """A trial (task, mechanism, seed), a sweep (layout, mechanism) or a case of a benchmark, as JSON."""

    key: str
    kind: str
    mechanism: str
    budget: str
    device: str
    task: str = ""
    seed: int = 0
    data: str | None = None
    layout: str = ""
    benchmark: str = ""
    case: str = ""

    def perform(self, progress: Callable[[float], None] = lambda fraction: None) -> dict:
        if self.kind == SWEEP:
            return measure.run_sweep(self.mechanism, self.layout, self.budget, self.device, progress).record()
        if self.kind == MEASURE:
            from attnlab.arena import bench

            record = bench.find(self.benchmark).measure(json.loads(self.case), self.device, progress)
            return {"benchmark": self.benchmark, "mechanism": self.mechanism, **record}
        task = _loaded(self.task, self.budget, self.data)
        return train.run_trial(task, self.mechanism, self.seed, self.device, progress).record()


def failed(job: Job, reason: str) -> dict:
    """The record of a job that came to no end; the same command tries it again."""
    about: dict = {"mechanism": job.mechanism, "points": [], "status": "failed", "reason": reason}
    if job.kind == MEASURE:
        return {**about, "benchmark": job.benchmark, "case": json.loads(job.case)}
    return {**about, "task": job.task, "seed": job.seed, "layout": job.layout}


@cache
def _loaded(name: str, budget: str, data: str | None) -> Task:
    return find_task(name)(budget, data)


def trial(task: Task, mechanism: str, seed: int, budget: str, device: str) -> Job:
    data = None if task.data is None else str(task.data)
    parts = (TRIAL, task.name, asdict(task.budget), task.digest(), _sources(type(task), train, ends), seed)
    return Job(_key(mechanism, device, *parts), TRIAL, mechanism, budget, device, task.name, seed, data)


def sweep(mechanism: str, layout: str, budget: str, device: str, threads: int) -> Job:
    parts = (SWEEP, layout, measure.WIDTH[budget], measure.LENGTHS[budget], _sources(measure), threads)
    return Job(_key(mechanism, device, *parts), SWEEP, mechanism, budget, device, layout=layout)


def measurement(name: str, case: dict, budget: str, device: str, threads: int) -> Job:
    """A case of the benchmark `name`; what it is measured with is part of its key."""
    from attnlab.arena import bench
    from attnlab.arena.bench import curve, operators

    text = json.dumps(case)
    peers = {package: _version(package) for package in ("natten", "fla", "x_transformers")}
    sources = _sources(bench, bench.find(name), curve, operators)
    parts = [name, text, sources, peers, torch.device(device).type, threads, __version__, torch.__version__]
    key = hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()
    return Job(key, MEASURE, case.get("operator", name), budget, device, benchmark=name, case=text)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _key(mechanism: str, device: str, *parts: object) -> str:
    card = None if mechanism == NONE else cards.describe(mechanism)
    about = (mechanism, dict(card.sample), _sources(cards.target(mechanism))) if card else (mechanism,)
    device_kind = torch.device(device).type
    everything = json.dumps([about, parts, _sources(network), device_kind, __version__, torch.__version__], default=str)
    return hashlib.blake2b(everything.encode(), digest_size=12).hexdigest()


def _sources(*things: object) -> str:
    """A digest of the files in which things are defined."""
    total = hashlib.blake2b(digest_size=8)
    for thing in things:
        module = inspect.getmodule(thing)
        path = getattr(module, "__file__", None)
        total.update(_contents(path) if path else repr(thing).encode())
    return total.hexdigest()


@cache
def _contents(path: str) -> bytes:
    return Path(path).read_bytes()


def load_files(paths: Sequence[Path | str]) -> None:
    """Runs files of the user's, so that the tasks and mechanisms that they register take part."""
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(
                f"load: {path} is not a file; a Python file that registers tasks or mechanisms is wanted"
            )
        name = f"attnlab_loaded_{path.stem}"
        if name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"load: {path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
