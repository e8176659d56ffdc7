"""Which backend runs a problem, and why: the cheapest by predicted time of those that can."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnlab.backends import Backend
from attnlab.backends.dense import Dense
from attnlab.backends.flex import Flex, FlexFailed
from attnlab.backends.natten import Natten
from attnlab.backends.reference import Reference
from attnlab.backends.routed import RoutedBlocks
from attnlab.backends.tiles import Tiles
from attnlab.cost import Cost, available_bytes
from attnlab.problem import Problem

if TYPE_CHECKING:
    from rich.table import Table

# Those that torch.compile and torch.export can follow come in the order in which they are tried there.
BACKENDS: dict[str, Backend] = {b.name: b for b in (Natten(), Tiles(), Flex(), Dense(), RoutedBlocks(), Reference())}

# What is small enough is not worth asking the system about.
_SURELY_FITS = 2**28
_LIMIT = 4096
_compiling: ContextVar[bool] = ContextVar("attnlab_compiling", default=False)
_chosen: dict[tuple[object, ...], Backend] = {}


@contextmanager
def compiling(enabled: bool = True) -> Iterator[None]:
    """Inside, backends that compile themselves (FlexAttention) may be chosen on the CPU: seconds once per problem."""
    token = _compiling.set(enabled)
    try:
        yield
    finally:
        _compiling.reset(token)


def may_compile(device: torch.device) -> bool:
    """Whether a backend may compile here without being inside torch.compile: on a GPU always, elsewhere if asked to."""
    return device.type == "cuda" or _compiling.get()


def run(problem: Problem, q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor | None]:
    """Run `problem` on the backend that `choose` names; on the next best where a compiler gave up on the first."""
    while True:
        chosen = choose(problem, backend)
        try:
            return chosen.run(problem, q, k, v)
        except FlexFailed:
            # From now on the backend says that it cannot, so it is not chosen again, and `explain` tells why.
            if backend != "auto":
                raise
            _chosen.pop(problem.key, None)


def choose(problem: Problem, backend: str = "auto") -> Backend:
    """The backend named `backend`, or for "auto" the one predicted fastest of those that can run `problem`.

    Raises MemoryError, with the estimate, if what is needed is more than the device has free.
    """
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {backend!r}")
        reason = BACKENDS[backend].unsupported(problem)
        if reason:
            raise ValueError(f"backend {backend!r} does not support this problem: {reason}")
        return BACKENDS[backend]
    if problem.traced:
        # A tracer can follow neither the cost of a pattern nor a cache.
        return next(b for b in BACKENDS.values() if not b.unsupported(problem))
    key = problem.key
    found = _chosen.get(key)
    if found is None:
        found = BACKENDS[explain(problem).decide()]
        if not problem.routed:
            if len(_chosen) >= _LIMIT:
                _chosen.clear()
            _chosen[key] = found
    return found


@dataclass(frozen=True)
class Row:
    """One backend's answer: its predicted cost, or the reason why it cannot run the problem."""

    name: str
    reason: str
    cost: Cost | None


@dataclass(frozen=True)
class Explanation:
    """What every backend would cost, and the choice; prints as a table.

    `choice` is empty if whatever could run needs more memory than is free. `compiled` is what the backends that only
    lack permission to compile would cost.
    """

    problem: Problem
    rows: tuple[Row, ...]
    compiled: tuple[Row, ...]
    available: float

    @property
    def choice(self) -> str:
        able = [r for r in self.rows if r.cost is not None and r.cost.memory <= self.available]
        return min(able, key=lambda r: r.cost.seconds).name if able else ""  # type: ignore[union-attr]

    def decide(self) -> str:
        """`choice`, or MemoryError where it is empty."""
        if self.choice:
            return self.choice
        least = min(r.cost.memory for r in self.rows if r.cost is not None)
        raise MemoryError(
            f"{describe(self.problem)} needs about {_bytes(least)} on the only backends that can run it "
            f"({', '.join(r.name for r in self.rows if r.cost is not None)}), and {_bytes(self.available)} are free"
        )

    def gain(self) -> str:
        """What compiling would gain, as a sentence; empty if nothing."""
        now = next((r.cost for r in self.rows if r.name == self.choice), None)
        found = [r for r in self.compiled if r.cost is not None]
        if now is None or not found:
            return ""
        best = min(found, key=lambda r: r.cost.seconds)  # type: ignore[union-attr]
        times = now.seconds / best.cost.seconds  # type: ignore[union-attr]
        what = f"compiled, {best.name} is predicted to take {_seconds(best.cost.seconds)}"  # type: ignore[union-attr]
        if times > 1.05:
            return f"{what}, {times:.1f}× faster: opt in with attnlab.compiling()"
        return f"{what}: compiling would gain nothing"

    def cells(self) -> list[tuple[str, ...]]:
        """The table: a row of texts for each backend, below the head."""
        rows: list[tuple[str, ...]] = [("backend", "FLOPs", "bytes", "memory", "time", "")]
        for row in self.rows:
            if row.cost is None:
                rows.append((row.name, "", "", "", "", row.reason))
                continue
            note = "← chosen" if row.name == self.choice else ""
            if row.cost.memory > self.available:
                note = f"needs more than the {_bytes(self.available)} that are free"
            c = row.cost
            rows.append((row.name, _count(c.flops), _bytes(c.bytes), _bytes(c.memory), _seconds(c.seconds), note))
        return rows

    def __str__(self) -> str:
        rows = self.cells()
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [describe(self.problem)]
        for row in rows:
            first, *numbers, note = row
            cells = [first.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True)), note]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, *filter(None, [self.gain()])])

    def __rich__(self) -> Table:
        from rich.table import Table

        head, *rows = self.cells()
        table = Table(title=describe(self.problem), caption=self.gain() or None)
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if 0 < i < 5 else "left")
        for row in rows:
            table.add_row(*row, style="bold" if row[0] == self.choice else None)
        return table


def explain(problem: Problem) -> Explanation:
    """Ask every backend about `problem`."""
    rows = tuple(_ask(b, problem) for b in BACKENDS.values())
    compiled: tuple[Row, ...] = ()
    if not problem.may_compile:
        allowed = replace(problem, may_compile=True)
        refused = [BACKENDS[r.name] for r in rows if r.cost is None]
        compiled = tuple(row for row in (_ask(b, allowed) for b in refused) if row.cost is not None)
    most = max(r.cost.memory for r in rows if r.cost is not None)
    return Explanation(problem, rows, compiled, math.inf if most < _SURELY_FITS else available_bytes(problem.device))


def _ask(backend: Backend, problem: Problem) -> Row:
    reason = backend.unsupported(problem)
    return Row(backend.name, reason, None if reason else backend.cost(problem))


def describe(p: Problem) -> str:
    """The problem in one line."""
    kv = "" if p.kv_heads == p.heads else f" (key heads {p.kv_heads})"
    more = [str(p.dtype).removeprefix("torch."), p.device.type, "with gradient" if p.needs_grad else "inference"]
    if not p.is_softmax:
        more.append(str(p.weighting))
    if p.bias is not None:
        more.append("trained bias" if p.trained_bias else "bias")
    if p.dropout:
        more.append(f"dropout {p.dropout:g}")
    if p.return_lse:
        more.append("lse")
    return f"{p.pattern} on B {p.batch}, H {p.heads}{kv}, Nq {p.nq}, Nk {p.nk}, D {p.dim}: {', '.join(more)}"


def _count(x: float) -> str:
    return _scaled(x, 1e3, ("", "k", "M", "G", "T", "P"))


def _bytes(x: float) -> str:
    return _scaled(x, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def _scaled(x: float, base: float, units: tuple[str, ...]) -> str:
    i = 0 if x < 1 else min(int(math.log(x, base)), len(units) - 1)
    return f"{x / base**i:.3g}{units[i]}"


def _seconds(x: float) -> str:
    return f"{x * 1e6:.3g} µs" if x < 1e-3 else f"{x * 1e3:.3g} ms" if x < 1 else f"{x:.3g} s"
