"""hermansh-id/rcmha (arXiv 2308.03429): its relative attention with convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import load
from attnlab.nn.softmax.rcmha import RelativeConvolutionalAttention
from attnlab.patterns import Explicit


@official("hermansh-id/rcmha", "rcmha/attention.py::RelativeMultiHeadAttention", ours=RelativeConvolutionalAttention)
class RelativeMultiHeadAttention:
    """Time first; keys are the memory and then the current tokens, and the mask (Lq, Lk, 1 or B) keeps where not 0."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = ("query", "key", "value")
        return {
            "wqkv.weight": torch.cat([params[f"{p}.0.linear.weight"] for p in parts]),
            "value_bias": params["value.0.linear.bias"],
            # (D, 1, taps) each
            "taps_weight": torch.stack([params[f"{p}.1.conv.weight"].permute(2, 1, 0) for p in parts], 1),
            "taps_bias": torch.stack([params[f"{p}.1.conv.bias"] for p in parts])[:, None],
            "distance_key": params["key_pos_embeddings"],
            "distance_bias": params["key_pos_bias"],
            "query_bias": params["query_pos_bias"][:, None],
            "wo.weight": params["output.weight"],
            "wo.bias": params["output.bias"],
        }

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> RelativeConvolutionalAttention:
        rows, heads, _ = params["key_pos_embeddings"].shape
        module = RelativeConvolutionalAttention(
            len(params["output.bias"]),
            heads=heads,
            reach=rows // 2,
            taps=params["query.1.conv.weight"].shape[-1],
            dropout=arguments.get("dropout_prob", arguments.get("dropout", 0.1)),
        )
        load(module, RelativeMultiHeadAttention.rename(params))
        return module

    @staticmethod
    def run(module: RelativeConvolutionalAttention, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        query, key = inputs["query"].transpose(0, 1), inputs["key"].transpose(0, 1)
        (q,), _ = module.convolve(query, slice(0, 1))
        (k, v), _ = module.convolve(key, slice(1, 3))
        if "value" in inputs:
            (v,), _ = module.convolve(inputs["value"].transpose(0, 1), slice(2, 3))
        pattern = None
        if "mask" in inputs:
            seen = (inputs["mask"] != 0).permute(2, 0, 1).expand(-1, q.shape[2], -1)
            pattern = Explicit(seen[0] if len(seen) == 1 else seen[:, None])
        y = module.mix(q, k, v, x=query, pattern=pattern, offset=k.shape[2] - q.shape[2])
        return {"y": module.merge(y).transpose(0, 1)}
