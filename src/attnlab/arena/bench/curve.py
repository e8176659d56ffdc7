"""Forward, and forward with backward, of an operator over lengths: time, memory, and how far from the truth it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor

from attnlab.arena import memory
from attnlab.arena.bench import Progress
from attnlab.arena.bench.operators import OPERATORS, Run
from attnlab.arena.measure import Point, seconds_of, too_much
from attnlab.attend import attend
from attnlab.patterns import Pattern
from attnlab.routing import Route

LENGTHS = {"small": (1024, 4096), "medium": (1024, 4096, 16_384), "long": (1024, 4096, 16_384, 65_536)}
PATIENCE = {"small": 4.0, "medium": 20.0, "long": 60.0}  # seconds that one call may be expected to take
_PROBED = 32  # last queries, which are compared with float64


class Prepared(NamedTuple):
    """An operator made for one length, the pairs that it is to look at, and what its outputs should be."""

    run: Run
    area: int
    truth: Callable[..., Tensor]  # of q, k, v in float64: the outputs of the last queries


def measure(case: dict, prepare: Callable[[int], Prepared], device: str, progress: Progress) -> dict:
    """One operator over lengths.

    The case gives operator, lengths, heads, kv_heads, head_dim, dtype, patience. A length that would take too long or
    too much is left out with its reason; what an operator raises is its result.
    """
    lengths: Sequence[int] = case["lengths"]
    record: dict = {"mechanism": case["operator"], "case": case, "status": "done", "reason": "", "points": []}
    before: dict[str, list[Point]] = {"forward": [], "train": []}
    for i, length in enumerate(lengths):
        point: dict = {"length": length}
        record["points"].append(point)
        try:
            run, point["area"], truth = prepare(length)
        except (ImportError, ValueError) as refusal:
            point["reason"] = str(refusal)
            continue
        inputs = _inputs(case, length, device)
        for name in ("forward", "train"):
            reason = too_much(before[name], length, 2.0, case["patience"], device)
            try:
                found = Point(length, reason=reason) if reason else _timed(run, inputs, name == "train", device)
            except Exception as error:  # whatever an operator raises is its own result
                found = Point(length, reason=f"{type(error).__name__}: {error}"[:200])
            before[name].append(found)
            point[name] = {key: value for key, value in asdict(found).items() if key not in ("length", "flops")}
        if point["forward"]["seconds"]:
            point["deviation"] = _deviation(run, inputs, truth)
        progress((i + 1) / len(lengths))
    return record


def _inputs(case: dict, length: int, device: str) -> list[Tensor]:
    rng = torch.Generator().manual_seed(length)
    kind = getattr(torch, case["dtype"])
    sizes = (case["heads"], case["kv_heads"], case["kv_heads"])
    return [torch.randn(1, h, length, case["head_dim"], generator=rng).to(device, kind) for h in sizes]


def _timed(run: Run, inputs: list[Tensor], train: bool, device: str) -> Point:
    leaves = [x.clone().requires_grad_() for x in inputs] if train else inputs
    upstream = torch.randn_like(inputs[0])

    def call() -> object:
        if train:
            return torch.autograd.grad(run(*leaves), leaves, upstream)
        with torch.no_grad():
            return run(*leaves)

    call()  # compiles, and warms up
    return Point(inputs[0].shape[2], seconds_of(call, device), memory.peak(call, device))


@torch.no_grad()
def _deviation(run: Run, inputs: list[Tensor], truth: Callable[..., Tensor]) -> float:
    """The largest error of the last queries' outputs."""
    wanted = truth(*(x.double() for x in inputs))
    return float((run(*inputs)[:, :, -wanted.shape[2] :].double() - wanted).abs().max())


def attended(operator: str, pattern: Pattern, route: Route | None, area: int, length: int, device: str) -> Prepared:
    """`operator` for attention where `pattern`, or `route`, says."""

    def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shown = pattern if route is None else route.select(q, k)
        start = max(0, length - _PROBED)
        return attend(q[:, :, start:], k, v, pattern=shown.starting_at(start), backend="reference")

    return Prepared(OPERATORS[operator](pattern, route, length, device), area, truth)
