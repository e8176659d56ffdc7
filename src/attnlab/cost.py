"""What an operation costs: counted FLOPs, and the analytical estimate that the planner compares backends by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


@dataclass(frozen=True)
class Cost:
    """Predicted cost of one call: arithmetic, memory traffic, the time that they take together, and the memory that is
    taken beside inputs and outputs."""

    flops: float
    bytes: float
    seconds: float
    memory: float = 0.0


@dataclass(frozen=True)
class Machine:
    """How fast a device is at each kind of kernel: FLOPs per second, bytes per second, seconds per call."""

    rates: Mapping[str, float]
    bandwidth: float
    call: float

    def cost(self, flops: float, *, kernel: str, moved: float = 0.0, memory: float = 0.0, calls: float = 1.0) -> Cost:
        """The cost of `flops` in a `kernel`, with `moved` bytes to and from memory that its rate does not include."""
        seconds = flops / self.rates[kernel] + moved / self.bandwidth + calls * self.call
        return Cost(flops, moved, seconds, memory)


# Measured in float32 on one core of a 2-core server CPU with AVX-512 (2.0 GHz), torch 2.13. Only their ratios matter
# for a choice.
_CORE = Machine({"dense": 3e10, "by_hand": 3e10, "float64": 1e10, "flex": 3e10}, 5e9, 2e-5)
# Of a data-centre GPU in bfloat16, from its data sheet and the share that attention kernels reach.
_GPU = Machine({"dense": 3e14, "by_hand": 2e14, "float64": 2e13, "flex": 2.5e14, "natten": 3e14}, 2e12, 1e-5)


def machine(device: torch.device) -> Machine:
    """What is known about the speed of `device`, with the threads that torch uses now."""
    if device.type != "cpu":
        return _GPU
    threads = torch.get_num_threads()
    return Machine({k: r * threads for k, r in _CORE.rates.items()}, _CORE.bandwidth * threads, _CORE.call)


def available_bytes(device: torch.device) -> float:
    """Memory that is free on `device`; infinity where it cannot be told."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            found = {line.partition(":")[0]: line.split()[1] for line in lines}
        return 1024.0 * int(found["MemAvailable"])
    except (OSError, KeyError):
        return math.inf


def _cpu_flash(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_flash_backward(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    # Scores again, then the gradients of scores, q, k and v: five products for the forward's two.
    return sdpa_flop_count(query, key, value) * 5 // 2


def count_flops(function: Callable[..., Any], *args: Any, **keywords: Any) -> int:
    """FLOPs of one call of `function`, two per multiply-add: torch's counter and the CPU kernels that it misses."""
    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: _with_shapes(_cpu_flash),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _with_shapes(_cpu_flash_backward),
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function(*args, **keywords)
    return int(counter.get_total_flops())


def _with_shapes(formula: Callable[..., int]) -> Callable[..., int]:
    def count(*args: Any, out_val: Any = None, **keywords: Any) -> int:
        return formula(*(tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args), **keywords)

    count._get_raw = True  # type: ignore[attr-defined]
    return count


def fit_growth(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Least-squares slope of log cost over log size: the exponent with which the cost grows."""
    if len(sizes) != len(costs) or len(sizes) < 2:
        raise ValueError(f"sizes and costs need the same length of at least 2, got {len(sizes)} and {len(costs)}")
    x, y = [math.log(s) for s in sizes], [math.log(c) for c in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
