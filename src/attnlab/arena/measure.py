"""What a mechanism costs by itself: latency, memory and FLOPs over lengths, and the time of a decode step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from attnlab import cards
from attnlab.arena import memory
from attnlab.arena.network import NONE, mixer
from attnlab.arena.task import CAUSAL, GRID
from attnlab.cost import count_flops, fit_growth

# "long" is for cost curves alone: no task has a budget of that name.
LENGTHS = {
    "small": (256, 1024, 4096),
    "medium": (256, 1024, 4096, 16_384),
    "long": (256, 1024, 4096, 16_384, 65_536),
    # CAB fits its curves of cost to powers of two up to 8,192, at width 512.
    "cab-tiny": (256, 512, 1024, 2048, 4096),
    "cab-medium": (256, 512, 1024, 2048, 4096, 8192),
    "cab-paper": (256, 512, 1024, 2048, 4096, 8192),
}
WIDTH = {"small": 64, "medium": 128, "long": 64, "cab-tiny": 64, "cab-medium": 128, "cab-paper": 512}
DECODE_AT = (64, 4096)
_PATIENCE = {
    "small": 3.0,
    "medium": 20.0,
    "long": 6.0,
    "cab-tiny": 3.0,
    "cab-medium": 20.0,
    "cab-paper": 60.0,
}  # seconds that one call may be expected to take
_REPEAT_FOR = 0.15  # seconds over which a call is repeated, at least three times


@dataclass
class Point:
    """One length. Without seconds, `reason` says why it was not measured."""

    length: int
    seconds: float | None = None
    memory: int | None = None
    flops: int | None = None
    reason: str = ""


@dataclass
class Sweep:
    """Inference of one mechanism, batch 1, over lengths; the growths are exponents of the length."""

    mechanism: str
    layout: str
    width: int
    status: str = "done"
    reason: str = ""
    points: list[Point] = field(default_factory=list)
    decode: dict[int, float] = field(default_factory=dict)  # position → seconds of the next token
    growth: float | None = None  # of the time
    flops_growth: float | None = None
    seconds: float | None = None  # that all of it took

    def record(self) -> dict:
        return asdict(self)


def run_sweep(
    mechanism: str,
    layout: str,
    budget: str = "small",
    device: str = "cpu",
    progress: Callable[[float], None] = lambda fraction: None,
) -> Sweep:
    """Measures; a length that would not fit or would take too long is left out with its reason."""
    start = time.perf_counter()
    width = WIDTH[budget]
    sweep = Sweep(mechanism, layout, width)
    try:
        torch.manual_seed(0)
        module = mixer(mechanism, width, layout).to(device).eval()
        with torch.no_grad():
            for i, length in enumerate(LENGTHS[budget]):
                reason = too_much(sweep.points, length, _growth(mechanism), _PATIENCE[budget], device)
                sweep.points.append(
                    Point(length, reason=reason) if reason else _point(module, length, layout, width, device)
                )
                progress((i + 1) / (len(LENGTHS[budget]) + 1))
            if layout == CAUSAL and mechanism != NONE and cards.describe(mechanism).claims(cards.STREAMING):
                sweep.decode = {at: _decode(module, at, width, device) for at in DECODE_AT}
    except Exception as error:  # whatever a mechanism raises is its own result
        sweep.status, sweep.reason = "failed", f"{type(error).__name__}: {error}"[:300]
    sweep.seconds = time.perf_counter() - start
    timed = [point for point in sweep.points if point.seconds][-2:]  # the longest: short ones measure the overhead
    if len(timed) == 2:
        sweep.growth = fit_growth([p.length for p in timed], [p.seconds for p in timed if p.seconds])
        if all(p.flops for p in timed):
            sweep.flops_growth = fit_growth([p.length for p in timed], [p.flops for p in timed if p.flops])
    return sweep


def _growth(mechanism: str) -> float:
    """The exponent that the card claims for its FLOPs; quadratic where it claims none."""
    return 2.0 if mechanism == NONE else cards.describe(mechanism).growth or 2.0


def _point(module: nn.Module, length: int, layout: str, width: int, device: str) -> Point:
    side = math.isqrt(length)
    grid = (side, side) if layout == GRID else None
    x = torch.randn(1, length, width, device=device)

    def call() -> object:
        return module(x, grid=grid)

    flops = count_flops(call)  # also warms up
    return Point(length, seconds_of(call, device), memory.peak(call, device), flops)


def too_much(before: list[Point], length: int, growth: float, patience: float, device: str) -> str:
    """Why a length is left out, foretold from the one before and the growth; empty if it is not."""
    if not before:
        return ""
    last = before[-1]
    if last.seconds is None:
        return "longer than a length that was left out"
    times = (length / last.length) ** growth
    if last.memory and (refusal := memory.refusal(int(last.memory * times), device)):
        return refusal
    if last.seconds * times > patience:
        return f"would take about {last.seconds * times:.0f} s a call"
    return ""


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Time of a call at its least disturbed."""
    times: list[float] = []
    while len(times) < 3 or (sum(times) < _REPEAT_FOR and len(times) < 50):
        start = time.perf_counter()
        call()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _decode(module: nn.Module, position: int, width: int, device: str) -> float:
    """Seconds of one more token behind `position` tokens."""
    x = torch.randn(1, position, width, device=device)
    _, state = module(x, state=module.initial_state(1, device=device, dtype=x.dtype))  # type: ignore[operator]
    token = x[:, :1]
    times: list[float] = []
    for _ in range(12):
        start = time.perf_counter()
        _, state = module(token, state=state)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
