"""hermansh-id/rcmha (arXiv 2308.03429): its relative attention with convolutions, and the Transformer-XL around it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.language.transformer_xl import TransformerXL
from attnlab.nn.softmax.rcmha import RelativeConvolutionalAttention
from attnlab.patterns import Explicit

AROUND: tuple[Rule, ...] = (
    (r"^src_embed\.", "embedding."),
    (r"^generator\.", "head."),
    (r"^transformer\.norm\.", "norm."),
    (r"^transformer\.layers\.", "blocks."),
    (r"\.norm_self_attn\.", ".norm1."),
    (r"\.norm_ff\.", ".norm2."),
    (r"\.feed_forward\.layer(\d)\.", r".mlp.fc\1."),
)


def attention(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One attention's parameters under our names, with convolutions or (as labml-nn has it) without."""
    parts, convolved = ("query", "key", "value"), "query.1.conv.weight" in params
    inner = ".0.linear" if convolved else ".linear"
    ours = {
        "wqkv.weight": torch.cat([params[f"{p}{inner}.weight"] for p in parts]),
        "value_bias": params[f"value{inner}.bias"],
        "distance_key": params["key_pos_embeddings"],
        "distance_bias": params["key_pos_bias"],
        "query_bias": params["query_pos_bias"][:, None],
        "wo.weight": params["output.weight"],
        "wo.bias": params["output.bias"],
    }
    if convolved:  # (D, 1, taps) each
        ours["taps_weight"] = torch.stack([params[f"{p}.1.conv.weight"].permute(2, 1, 0) for p in parts], 1)
        ours["taps_bias"] = torch.stack([params[f"{p}.1.conv.bias"] for p in parts])[:, None]
    return ours


@official("hermansh-id/rcmha", "rcmha/attention.py::RelativeMultiHeadAttention", ours=RelativeConvolutionalAttention)
class RelativeMultiHeadAttention:
    """Time first; keys are the memory and then the current tokens, and the mask (Lq, Lk, 1 or B) keeps where not 0."""

    rename = staticmethod(attention)

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
        load(module, attention(params))
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


def model(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole model's parameters under our names."""
    ours: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in rename(params, AROUND).items():
        inside = re.match(r"(blocks\.\d+)\.self_attn\.(.*)", name)
        if inside:
            layers.setdefault(inside[1], {})[inside[2]] = tensor
        else:
            ours[name] = tensor
    for layer, found in layers.items():
        ours |= {f"{layer}.mixer.{name}": tensor for name, tensor in attention(found).items()}
    return ours


@official("hermansh-id/rcmha", "rcmha/model.py::AutoregressiveModel", ours=TransformerXL)
class AutoregressiveModel:
    """Characters x (N, B) and the memory, a tensor (M, B, C) per layer, to logits (N, B, V) and the layers' inputs."""

    rename = staticmethod(model)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> TransformerXL:
        ours = model(params)
        vocabulary, dim = ours["embedding.weight"].shape
        rows, heads, _ = ours["blocks.0.mixer.distance_key"].shape
        filters = ours.get("blocks.0.mixer.taps_weight")
        module = TransformerXL(
            vocabulary=vocabulary,
            dim=dim,
            depth=1 + max(int(name.split(".")[1]) for name in ours if name.startswith("blocks.")),
            heads=heads,
            hidden=len(ours["blocks.0.mlp.fc1.bias"]),
            memory=arguments.get("mem_len", min(128, rows // 4)),
            reach=rows // 2,
            taps=1 if filters is None else len(filters),
            dropout=arguments.get("dropout", arguments.get("dropout_prob", 0.0)),
        )
        load(module, ours)
        return module

    @staticmethod
    def run(module: TransformerXL, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = inputs["x"].transpose(0, 1)
        state = module.initial_state(len(ids))
        memory = [inputs[name] for name in sorted(inputs, key=_number) if name.startswith("mem")]
        if memory:
            stacked = memory[0] if memory[0].dim() == 4 else memory
            state.layers = [m.transpose(0, 1) for m in stacked]
        logits, state = module(ids, state)
        # The authors' model returns what came into each layer, and its caller remembers it.
        seen = [layer[:, -ids.shape[1] :].transpose(0, 1) for layer in state.layers]
        return {"y": logits.transpose(0, 1), **{f"mem.{i}": layer for i, layer in enumerate(seen)}}


def _number(name: str) -> int:
    found = re.search(r"\d+", name)
    return int(found[0]) if found else -1
