"""Which backend runs a problem, and why."""

from __future__ import annotations

from dataclasses import dataclass

from attnlab.backends import Backend
from attnlab.backends.dense import Dense
from attnlab.backends.reference import Reference
from attnlab.problem import Problem

BACKENDS: dict[str, Backend] = {b.name: b for b in (Dense(), Reference())}


def choose(problem: Problem, backend: str = "auto") -> Backend:
    """The backend named `backend`, or for "auto" the cheapest of those that support `problem`."""
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {backend!r}")
        reason = BACKENDS[backend].unsupported(problem)
        if reason:
            raise ValueError(f"backend {backend!r} does not support this problem: {reason}")
        return BACKENDS[backend]
    able = [b for b in BACKENDS.values() if not b.unsupported(problem)]
    return min(able, key=lambda b: b.cost(problem).seconds)


@dataclass(frozen=True)
class Explanation:
    """What `explain` found."""

    choice: str


def explain(problem: Problem) -> Explanation:
    return Explanation(choose(problem).name)
