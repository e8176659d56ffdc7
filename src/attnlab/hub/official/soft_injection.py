"""SNU-DRL/Soft_Injection (arXiv 2507.20906): the task embedding mixed into the input of each output projection."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from attnlab.hub.official import official
from attnlab.lens.circuits.injection import mixed_in
from attnlab.nn.mechanism import join_heads, split_heads


@official("SNU-DRL/Soft_Injection", "last_replace_activation_w_avg.rep_act", "rep_act", "last_replace_activation_w_avg")
class ReplaceActivation:
    """`o_proj` of the edited heads. A projection's bias, which the authors' patch drops, is no concern of the edit."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> tuple[int, dict[int, Tensor]]:
        layers = {
            int(found[1]): weight
            for name, weight in params.items()
            if (found := re.search(r"\.(\d+)\..*weight$", name))
        }
        return arguments["heads"], layers

    @staticmethod
    def run(module: tuple[int, dict[int, Tensor]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        count, layers = module
        embedding = inputs["task_embedding"].squeeze(-2)  # (layers, heads, D), or one for each prompt
        if embedding.dim() == 3:
            embedding = embedding[None]
        found: dict[str, Tensor] = {}
        for layer, weight in layers.items():
            heads = split_heads(inputs[f"o_proj_input{layer}"], count)
            edited = mixed_in(heads, embedding[:, layer], inputs["alphas"][layer], inputs["last"])
            found[f"o_proj_output{layer}"] = join_heads(edited) @ weight.T
        first = min(layers)
        found["split"] = split_heads(inputs[f"o_proj_input{first}"], count).transpose(1, 2)
        if "decode_input" in inputs:
            one = split_heads(inputs["decode_input"], count)
            one = mixed_in(one, embedding[:, first], inputs["alphas"][first])
            found["decode_output"] = join_heads(one) @ layers[first].T
        return found
