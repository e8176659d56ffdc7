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
class Kernel:
    """How fast one way to compute runs: FLOPs, and softmaxed scores, per second."""

    flops: float
    scores: float


@dataclass(frozen=True)
class Machine:
    """How fast a device is at each kind of kernel, at moving bytes, and at starting a call."""

    kernels: Mapping[str, Kernel]
    bandwidth: float
    call: float

    def cost(
        self,
        kernel: str,
        scores: float,
        width: float,
        *,
        train: bool = False,
        dtype: torch.dtype = torch.float32,
        moved: float = 0.0,
        memory: float = 0.0,
        calls: float = 1.0,
    ) -> Cost:
        """The cost of `scores` query-key pairs in `kernel`, `width` = D + Dv.

        `moved` are bytes to and from memory beyond those of the kernel; a backward is two and a half forwards.
        """
        passes = 3.5 if train else 1.0
        flops = 2.0 * scores * width * passes
        speed = self.kernels[kernel]
        work = flops / speed.flops + scores * passes / speed.scores
        return Cost(flops, moved, work * _SLOWER.get(dtype, 1.0) + moved / self.bandwidth + calls * self.call, memory)


# One core of a server CPU with AVX-512 and AMX, torch 2.13, the least of twenty runs at 512 tokens, four heads of 32
# and 64: fused attention takes 0.7 and 1.1 ns for a pair on two cores, written-out attention 5, float64 written out 12.
# Only ratios matter for a choice.
_CORE = Machine(
    {
        "fused": Kernel(1.6e11, 1.6e9),
        "compiled": Kernel(1.6e11, 1.6e9),
        "by_hand": Kernel(5e10, 1.2e8),
        "float64": Kernel(2e10, 5e7),
    },
    bandwidth=3e9,
    call=2.5e-5,
)
# A data-centre GPU in bfloat16: its data sheet, and the share of it that attention kernels reach.
_GPU = Machine(
    {
        "fused": Kernel(4e14, 4e12),
        "compiled": Kernel(3e14, 3e12),
        "natten": Kernel(4e14, 4e12),
        "by_hand": Kernel(2e14, 2e11),
        "float64": Kernel(2e13, 5e10),
    },
    bandwidth=2e12,
    call=1e-5,
)
_SLOWER = {torch.float64: 2.2, torch.float16: 0.6, torch.bfloat16: 0.6}


def machine(device: torch.device) -> Machine:
    """What is known about the speed of `device`, with the threads that torch uses now."""
    if device.type != "cpu":
        return _GPU
    threads = torch.get_num_threads()
    kernels = {name: Kernel(k.flops * threads, k.scores * threads) for name, k in _CORE.kernels.items()}
    return Machine(kernels, _CORE.bandwidth * threads, _CORE.call)


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
