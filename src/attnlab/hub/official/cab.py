"""Shark-NLP/CAB (arXiv 2210.07661): its library of attentions, and the script of its compositional index."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnlab.arena.bench.cab_index import METRICS, Metric, compositional_index
from attnlab.hub.official import official


@official("Shark-NLP/CAB", "compositional_index.py::get_ci")
class CompositionalIndex:
    """Totals of the four patterns, to four decimals as printed, for whichever μ, σ and signs are given."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> dict[str, tuple[Metric, ...]]:
        return METRICS

    @staticmethod
    def run(module: dict[str, tuple[Metric, ...]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        totals = []
        for i, metrics in enumerate(module.values()):
            columns = [inputs[f"{name}{i}"].tolist() for name in ("mu", "sigma", "sign") if f"{name}{i}" in inputs]
            if columns:
                metrics = tuple(
                    replace(m, mean=mean, deviation=deviation, sign=sign)
                    for m, mean, deviation, sign in zip(metrics, *columns, strict=True)
                )
            totals.append(compositional_index(metrics, inputs[f"raw{i}"].tolist()).total)
        return {"total": torch.tensor([round(t, 4) for t in totals if t is not None])}
