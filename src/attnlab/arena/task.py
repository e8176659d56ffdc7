"""What a task is, and the table of all tasks. Add one with `@task`:

@task
class Parity(Task):
    name, metric, better = "parity", "accuracy", "higher"
    budgets = {"small": Budget(parameters=50_000, depth=2, steps=100, batch=32, length=64)}
    ...the six methods below...
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

CAUSAL, GRID = "causal", "grid"  # a sequence read from left to right; a map of tokens that all see each other
SELF = "self"  # a sequence whose tokens all see each other
CAUSAL_GRID = "causal-grid"  # a map that is read row by row
# The first tokens (half of them, or `Task.context`) are the context of the others: all of it, or for the i-th up to
# the i-th.
CROSS, CAUSAL_CROSS = "cross", "causal-cross"
LAYOUTS = (CAUSAL, GRID, SELF, CAUSAL_GRID, CROSS, CAUSAL_CROSS)


@dataclass(frozen=True)
class Budget:
    """How much every mechanism may spend on a task: the same parameters, steps, batches and schedule."""

    parameters: int
    depth: int
    steps: int
    batch: int
    length: int  # tokens of one training example
    learning_rate: float = 3e-3
    examples: int = 256  # held-out examples in the final evaluation


@dataclass(frozen=True)
class Score:
    """The task's metric on held-out data, and what lies behind it (named numbers, lists or tables)."""

    value: float
    details: dict = field(default_factory=dict)


class Task:
    """One question asked of every mechanism; a subclass states the data, the two ends of the network and the metric.

    The middle of the network (blocks of a mechanism and an MLP) belongs to the arena and is the same for all.
    Batches depend on the generator alone, so every mechanism sees the same ones.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""  # what is asked, in half a sentence
    metric: ClassVar[str]
    better: ClassVar[str] = "lower"
    layout: ClassVar[str] = CAUSAL
    positions: ClassVar[bool] = False  # mechanisms that take positions get rotary ones
    beyond: ClassVar[bool] = False  # evaluated at lengths it was not trained at
    reads: ClassVar[str] = ""  # what `--data` may point at: "text", "images" or nothing
    extra: ClassVar[str] = ""  # the extra that brings the data
    budgets: ClassVar[dict[str, Budget]]
    context: int | None = None  # how many of the tokens are the context, in cross layouts; half if None

    def __init__(self, budget: str = "small", data: Path | str | None = None):
        if budget not in self.budgets:
            raise ValueError(f"budget: {budget!r} is not one of {', '.join(self.budgets)} (task {self.name})")
        if data is not None and not self.reads:
            raise ValueError(f"data: the task {self.name} brings its own data and reads none; leave data out")
        self.budget = self.budgets[budget]
        self.data = None if data is None else Path(data)
        self.load()

    # what a subclass provides ------------------------------------------------------------------

    def load(self) -> None:
        """Reads the data once (nothing to do for a generator)."""

    def batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """The next training batch: inputs and targets, on the CPU."""
        raise NotImplementedError

    def stem(self, width: int) -> nn.Module:
        """From inputs to tokens (B, N, width), or to these and what goes past the blocks to the head beside them."""
        raise NotImplementedError

    def head(self, width: int) -> nn.Module:
        """From tokens (B, N, width), and what the stem gave beside them if it did, to outputs."""
        raise NotImplementedError

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def evaluate(self, predict: Callable[[Tensor], Tensor]) -> Score:
        """Held-out metric; `predict` maps inputs on the CPU to outputs on the CPU."""
        raise NotImplementedError

    def trivial(self) -> tuple[str, float]:
        """The name and the metric of what one would do without learning."""
        raise NotImplementedError

    def grid(self, length: int) -> tuple[int, int] | None:
        """The grid on which `length` tokens lie, for tasks on a grid."""
        return None

    def digest(self) -> str:
        """Changes when the data change, so that results of other data are never taken for these."""
        return ""

    # what follows from it ----------------------------------------------------------------------

    def choose(self, rng: torch.Generator, count: int) -> np.ndarray:
        """`batch` random integers below `count`."""
        return torch.randint(count, (self.budget.batch,), generator=rng).numpy()


TaskType = TypeVar("TaskType", bound="type[Task]")
_TASKS: dict[str, type[Task]] = {}
_OURS = ("text", "textures", "photos", "series", "recall", "needle", "lookup", "pixels")
_CAB = tuple(f"cab.{name}" for name in ("speech", "summaries", "faces", "language", "clouds", "forecasts"))


def task(cls: TaskType) -> TaskType:
    """Registers a task under its name."""
    missing = [name for name in ("name", "metric", "budgets") if not hasattr(cls, name)]
    if missing:
        raise TypeError(f"task: {cls.__name__} lacks {', '.join(missing)}")
    if cls.better not in ("lower", "higher") or cls.layout not in LAYOUTS:
        raise ValueError(f"task {cls.name}: better is 'lower' or 'higher' and layout is one of {', '.join(LAYOUTS)}")
    known = _TASKS.get(cls.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"task: the name {cls.name!r} is taken by {known.__module__}.{known.__qualname__}")
    _TASKS[cls.name] = cls
    return cls


def tasks() -> dict[str, type[Task]]:
    """Every registered task by name, ours first."""
    homes = [f"attnlab.arena.tasks.{module}" for module in _OURS + _CAB]
    for home in homes:
        importlib.import_module(home)
    ours = {cls.name: cls for home in homes for cls in _TASKS.values() if cls.__module__ == home}
    return ours | _TASKS


def find_task(name: str) -> type[Task]:
    table = tasks()
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(table)}"
        raise ValueError(f"task: no task is called {name!r}; {hint}")
    return table[name]


def need(module: str, extra: str, purpose: str):
    """Imports an optional package, or says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs the package {module.split('.')[0]!r}: pip install 'attnlab[{extra}]'"
        ) from error


def digest_of(*arrays: np.ndarray | bytes) -> str:
    total = hashlib.blake2b(digest_size=8)
    for array in arrays:
        total.update(array if isinstance(array, bytes) else np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
