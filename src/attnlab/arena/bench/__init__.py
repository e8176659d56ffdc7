"""Benchmarks of operators: what each costs on equal terms, over cases and lengths. A benchmark is a module with

TITLE         what is measured, in a sentence
cases         budget and options → the cases, as plain data: one job each
measure       a case → its record: points over lengths, or plain values
grids         the records → tables of numbers, for the terminal and the report
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

NAMES = ("ops", "longca", "scale", "cab")

Progress = Callable[[float], None]


@dataclass
class Grid:
    """A table of numbers: rows by name, None where there is none; `best` is "high" or "low" or nothing."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[float | None]]] = field(default_factory=list)
    best: str = ""

    def best_of(self, values: Sequence[float | None]) -> set[int]:
        """Where the best value of each length stands in a row, if it has a rival there."""
        places: dict[str, list[tuple[float, int]]] = {}
        for i, (column, value) in enumerate(zip(self.columns, values, strict=True)):
            if value is not None:
                places.setdefault(column.rpartition(" · ")[2], []).append((value, i))
        choose = {"high": max, "low": min}.get(self.best)
        return {choose(rivals)[1] for rivals in places.values() if len(rivals) > 1} if choose else set()


class Benchmark(Protocol):
    TITLE: str

    def cases(self, budget: str, **options: Any) -> list[dict]: ...

    def measure(self, case: dict, device: str, progress: Progress) -> dict: ...

    def grids(self, records: Sequence[dict]) -> list[Grid]: ...


def find(name: str) -> Benchmark:
    """The benchmark of that name."""
    if name not in NAMES:
        raise ValueError(f"benchmark must be one of {', '.join(NAMES)}, got {name!r}")
    module: Any = import_module(f"attnlab.arena.bench.{name}")
    return module


def pivot(
    title: str, records: Sequence[dict], row: str, value: Callable[[dict, dict], float | None], *, best: str = ""
) -> Grid:
    """One row per value of `row` in the cases, one column per operator and length, from the records' points."""
    columns: dict[tuple[str, int], None] = {}
    found: dict[str, dict[tuple[str, int], float | None]] = {}
    for record in records:
        for point in record.get("points") or ():
            at = (record["mechanism"], point["length"])
            columns[at] = None
            found.setdefault(record["case"][row], {})[at] = value(record, point)
    ordered = sorted(columns, key=lambda at: at[1])
    names = [f"{operator} · {length:,}" for operator, length in ordered]
    return Grid(title, names, [(name, [cells.get(at) for at in ordered]) for name, cells in found.items()], best)
