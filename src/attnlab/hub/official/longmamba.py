"""GATECH-EIC/LongMamba (arXiv 2504.16053): its calibration and its filters of steps, which lie channels first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from attnlab.hub.official import official
from attnlab.recipes import longmamba

_REPOSITORY = "GATECH-EIC/LongMamba"
_Outputs = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def _thousands(found: longmamba.Calibration) -> dict[str, Tensor]:
    """The tables by the authors' names: alpha_3k, thre_3k and so on."""
    tables = {"alpha": found.alpha, "thre": found.threshold}
    return {f"{name}_{n // 1000}k": values for name, table in tables.items() for n, values in table.items()}


@official(_REPOSITORY, "load_align_target.py::debug")
class Calibrate:
    """The calibration of one layer from one text."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> _Outputs:
        def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            found = longmamba.calibration(inputs["delta_t"][0].T, inputs["A"], clamp=float(arguments["sc"]))
            return {"tA_prod": found.decay, "decay": found.total, **_thousands(found)}

        return run

    @staticmethod
    def run(module: _Outputs, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return module(inputs)


@official(
    _REPOSITORY, "get_channelwise_*", "get_channelwise_topAlpha", "get_channelwise_topBound", "get_channelwise_offline",
    "get_channelwise_normalize", "get_channelwise_dt_threshold", "get_topk_mask_channelwise", "get_top_k_token_indices",
)  # fmt: skip
class Filters:
    """All that the inputs are there for."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> _Outputs:
        return partial(_filter, k=arguments.get("k", 2000), response=arguments.get("response_length", 0))

    @staticmethod
    def run(module: _Outputs, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return module(inputs)


def _filter(inputs: dict[str, Tensor], k: int, response: int) -> dict[str, Tensor]:
    delta = inputs["delta_t"].mT
    out = {"topk": longmamba.top(delta, k, response)}
    if "thr" in inputs:
        out["dt_thre"] = longmamba.above(delta, inputs["thr"], response)
    if "alpha" in inputs:
        out["topalpha"] = longmamba.share(delta, inputs["alpha"], response)
        out["offline"] = longmamba.rank(delta, inputs["alpha"], response)
    if "bound" in inputs:
        out["topbound"] = longmamba.bound(delta, inputs["bound"], response)
        out["normalize"] = longmamba.scaled(delta, inputs["bound"], response)
    return {**{name: x.mT for name, x in out.items()}, "topk_tokens": longmamba.top_tokens(delta, k, response)[0]}
