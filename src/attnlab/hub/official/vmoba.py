"""KwaiVGI/VMoBA (arXiv 2506.23858): the attention over packed sequences, and the reorderings around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnlab.attend import attend
from attnlab.hub.official import official
from attnlab.nn.sparse.block_routing import block_order
from attnlab.routing import BlockRoute, Routed, Scope, ThresholdBlocks, TopKBlocks, block_scores

_REPOSITORY = "KwaiVGI/VMoBA"
_SCOPES: dict[str, Scope] = {"query_head": "query", "block": "block", "head_global": "head", "overall": "all"}


@official(_REPOSITORY, "moba_attn_varlen")
class PackedAttention:
    """On packed heads `(S, H, D)` with `cu_seqlens`; `block_mask` and `gate` are `(blocks, H, S)`."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Callable[[tuple[int, ...]], BlockRoute]:
        """From the lengths of the packed sequences to the route."""
        shared: dict[str, Any] = {
            "block": arguments["moba_chunk_size"],
            "query_block": 1,
            "scope": _SCOPES[arguments.get("threshold_type", "query_head")],
            "own": True,
            "released": True,
        }

        def route(lengths: tuple[int, ...]) -> BlockRoute:
            if arguments.get("select_mode", "threshold") == "topk":
                return TopKBlocks(arguments["moba_topk"], lengths=lengths, **shared)
            return ThresholdBlocks(arguments.get("simsum_threshold", 0.25), lengths=lengths, **shared)

        return route

    @staticmethod
    def run(module: Callable[[tuple[int, ...]], BlockRoute], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        q, k, v = (inputs[n].transpose(0, 1).unsqueeze(0) for n in "qkv")
        route = module(tuple(inputs["cu_seqlens"].diff().tolist()))
        chosen = route.select(q, k)
        if not isinstance(chosen, Routed):
            raise TypeError(f"the route must choose blocks, got {type(chosen).__name__}")
        gate = block_scores(q, k, *route.partitions(q.shape[2], k.shape[2]))
        return {
            "y": attend(q, k, v, route=chosen)[0].transpose(0, 1),
            "block_mask": chosen.table[0].permute(2, 0, 1),
            "gate": gate[0].permute(2, 0, 1),
        }


@official(_REPOSITORY, "process_moba_input")
class ToBlocks:
    """On packed heads `(B, T·H·W, heads, D)`: in the order of the blocks, and the tokens of a block.

    `chunk_size` is an argument, or several are (`chunk_1d`, `chunk_2d`, …), each with its own outputs.
    """

    back = False

    @classmethod
    def build(cls, arguments: dict[str, Any], params: dict[str, Tensor]) -> Mapping[str, tuple[Tensor, int]]:
        grid = tuple(arguments["patch_resolution"])
        found = {}
        for name, chunk in arguments.items():
            if name.startswith("chunk_"):
                chunk = tuple(chunk) if isinstance(chunk, (list, tuple)) else (chunk,)
                order, blocks = block_order(grid, chunk)
                found[name.removeprefix("chunk_")] = (order.argsort() if cls.back else order, blocks.size)
        return found

    @staticmethod
    def run(module: Mapping[str, tuple[Tensor, int]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        for name, (order, size) in module.items():
            moved = inputs["x"].index_select(1, order.to(inputs["x"].device))
            outputs |= {f"order_{name}": moved, f"chunk_{name}": torch.tensor(size), "y": moved}
        return outputs


@official(_REPOSITORY, "process_moba_output")
class FromBlocks(ToBlocks):
    """The way back."""

    back = True
