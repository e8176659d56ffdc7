"""Dexter-GT-86/SinkLoRA (arXiv 2406.05678): the shifted attention that it takes from LongLoRA, over a Llama layer."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.official.llama import attention, scaling
from attnlab.nn.sparse.shifted_groups import ShiftedGroups
from attnlab.positions import Rotary


@official("Dexter-GT-86/SinkLoRA", "forward_noflashattn", "forward_flashattn", "LlamaAttention", ours=ShiftedGroups)
class ShiftedAttention:
    """Half the heads moved by half a group, no sinks, the last group wrapped; causal."""

    rename = staticmethod(attention)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> ShiftedGroups:
        dim = params["q_proj.weight"].shape[1]
        heads = arguments.get("num_attention_heads") or arguments["heads"]
        width = len(params["q_proj.weight"]) // heads
        turned = not re.search(r"rope\w* replaced by identity|no ?rope", arguments["text"], re.IGNORECASE)
        module = ShiftedGroups(
            dim,
            heads=heads,
            kv_heads=len(params["k_proj.weight"]) // width,
            head_dim=width,
            group=_share(arguments.get("group_size_ratio", 0.25)),
            moved=0.5,
            sinks=0,
            wrap=True,
            variant="release",
            bias="q_proj.bias" in params,
            out_bias="o_proj.bias" in params,
            position=Rotary(
                width, base=arguments.get("rope_theta", 10000.0), scaling=scaling(arguments.get("rope_scaling"))
            )
            if turned
            else None,
        )
        module.load_state_dict(attention(params))
        return module

    @staticmethod
    def run(module: ShiftedGroups, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


def _share(ratio: float | str) -> float:
    """A ratio given as a number or as "1/4"."""
    over, _, under = str(ratio).partition("/")
    return float(over) / float(under or 1)
