"""billpsomas/efficient-probing (arXiv 2506.10178): the pooling of a frozen encoder's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import load, rename
from attnlab.nn.cross.efficient_probing import EfficientProbing as Ours


@official("billpsomas/efficient-probing", "EfficientProbing", ours=Ours)
class EfficientProbing:
    """Tokens to one vector."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = rename(params, ((r"^v\.", "wv."), (r"^cls_token$", "queries")))
        return {**found, "queries": found["queries"][0]}

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        if arguments.get("num_heads", 1) != 1:
            raise ValueError(f"num_heads must be 1, as in the authors' use of it, got {arguments['num_heads']}")
        dim = arguments["dim"]
        if arguments.get("qk_scale") not in (None, dim**-0.5):
            raise ValueError(f"qk_scale must be None (dim^-½), got {arguments['qk_scale']}")
        module = Ours(
            dim,
            queries=arguments.get("num_queries", 32),
            shrink=arguments.get("d_out", 1),
            bias=arguments.get("qkv_bias", False),
        )
        load(module, EfficientProbing.rename(params))
        return module

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"], inputs.get("cls"))}
