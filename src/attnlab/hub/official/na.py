"""SHI-Labs/NATTEN's operators and modules (arXiv 2204.07143, 2403.04690, 2504.16922): heads come after the grid."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnlab.attend import attend, merge
from attnlab.hub.official import official
from attnlab.hub.renaming import load, rename
from attnlab.nn.spatial.neighborhood import NeighborhoodAttention
from attnlab.patterns import Neighborhood

_REPOSITORY = "SHI-Labs/NATTEN"


def rule(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """NATTEN's names for a neighborhood, as ours."""

    def tidy(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    causal = arguments.get("is_causal", False)
    return {
        "kernel": tidy(arguments["kernel_size"]),
        "stride": tidy(arguments.get("stride", 1)),
        "dilation": tidy(arguments.get("dilation", 1)),
        "causal": False if causal is None else tidy(causal),
    }


@official(_REPOSITORY, *(f"natten.functional.na{axes}d" for axes in (1, 2, 3)))
class NeighborhoodOp:
    """`na1d`, `na2d`, `na3d` on `(B, *grid, heads, D)`, with the log-sum-exp and the boolean mask."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> dict[str, Any]:
        return {"rule": rule(arguments), "scale": arguments.get("scale")}

    @staticmethod
    def run(module: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        grid = tuple(inputs["q"].shape[1:-2])
        pattern = Neighborhood(grid, **module["rule"])

        def heads_first(x: Tensor) -> Tensor:
            return x.flatten(1, -3).transpose(1, 2)

        q, k, v = (heads_first(inputs[name]) for name in "qkv")
        out, lse = attend(q, k, v, pattern=pattern, scale=module["scale"], return_lse=True)
        if "additional_keys" in inputs:
            more = [heads_first(inputs[f"additional_{name}"]) for name in ("keys", "values")]
            out, lse = merge([(out, lse), attend(q, *more, scale=module["scale"], return_lse=True)])
        return {
            "y": out.transpose(1, 2).unflatten(1, grid),
            "lse": lse.transpose(1, 2).unflatten(1, grid),
            "mask": pattern.matrix(q.shape[2]).to(torch.uint8),
        }


@official(_REPOSITORY, *(f"natten.NeighborhoodAttention{axes}D" for axes in (1, 2, 3)), ours=NeighborhoodAttention)
class NeighborhoodModule:
    """`NeighborhoodAttention1D`, `2D` and `3D` on `(B, *grid, C)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed = rename(params, ((r"^qkv\.", "wqkv."), (r"^proj\.", "wo."), (r"^rpb$", "table")))
        return {n: t.flatten(1).t() if n == "table" else t for n, t in renamed.items()}

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> NeighborhoodAttention:
        axes = int(re.search(r"Attention(\d)D", arguments["case_name"])[1])  # type: ignore[index]
        old = "embed_dim" not in arguments
        module = NeighborhoodAttention(
            arguments["dim" if old else "embed_dim"],
            heads=arguments["num_heads"],
            axes=axes,
            **rule(arguments),
            relative="rpb" in params,
            # Until 0.17 a small grid was padded; since then it is an error.
            small="pad" if old else "error",
            bias="qkv.bias" in params,
            out_bias="proj.bias" in params,
            scale=arguments.get("qk_scale"),
        )
        load(module, NeighborhoodModule.rename(params))
        return module

    @staticmethod
    def run(module: NeighborhoodAttention, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        grid = tuple(x.shape[1:-1])
        return {"y": module(x.flatten(1, -2), grid=grid).unflatten(1, grid)}
