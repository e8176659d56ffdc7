"""What an operation costs: counted FLOPs, and the analytical estimate that the planner compares backends by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


@dataclass(frozen=True)
class Cost:
    """Predicted cost of one call: arithmetic, memory traffic and the time that they take together."""

    flops: float
    bytes: float
    seconds: float


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
