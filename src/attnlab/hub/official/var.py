"""seilk/VisAttnSink (arXiv 2503.03321): sinks from hidden states, the rows chosen, and the edited attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.lens.edits.redistribute import image_heads, redistribute, sink_tokens


@official(
    "seilk/VisAttnSink",
    "DimProspector.run_logic",
    "HeadFork.run_logic",
    "VARProcessor.attn_redist",
)
class Redistribution:
    """One layer's edit of one pass: the prompt's if `output_token_count` is negative, else a new token's."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> dict[str, Any]:
        return arguments

    @staticmethod
    def run(module: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        weights, hidden = inputs["attn"], inputs["hidden"]
        keys = torch.arange(weights.shape[-1])
        end = module["image_begin"] + module["vis_len"]
        image = (keys >= module["image_begin"]) & (keys < end)
        sinks = sink_tokens(hidden, module["sink_dims"], module["tau"]) & (module.get("layer", 2) >= 2)
        sinks = torch.nn.functional.pad(sinks, (0, len(keys) - sinks.shape[-1]))
        chosen = image_heads(weights, sinks, image, rho=module["rho"], floor=module["summ"])
        prompt = module.get("output_token_count", -1) < 0
        after = torch.arange(weights.shape[-2]) >= (end if prompt else 0)
        return {
            "sink_indices": sinks.any(0).nonzero()[:, 0],
            "selected_coords_b_h_q": chosen.nonzero(),
            "attn": redistribute(weights, sinks, image, chosen & after, keep=module["p"]),
        }
