"""hasanar1f/llava-hallunication-fix (arXiv 2501.12206): the choice of patches and the edited self-attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from attnlab.hub.official import official
from attnlab.lens.edits.emphasise import emphasise, informative_patches
from attnlab.nn.mechanism import join_heads, split_heads


@official("hasanar1f/llava-hallunication-fix", "update_modpai_alpha", "get_top_ratio", "spatial_attention_top_tokens")
class Selection:
    """The vision encoder's attention in its first layer and its last but one to indices of patches."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> dict[str, Any]:
        return {"local": arguments.get("local_token_ratio", 0.25), "spatial": arguments.get("spatial_token_ratio", 0.0)}

    @staticmethod
    def run(module: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = informative_patches(inputs["vit_attn_first"], inputs["vit_attn_penultimate"], **module)
        return {
            "top_tokens_sorted": found.top.nonzero()[:, 0],
            "bottom_tokens_sorted": found.bottom.nonzero()[:, 0],
            "outlier_ratio": torch.tensor(found.outliers),
        }


@official("hasanar1f/llava-hallunication-fix", "llama_new_forward")
class SelfAttention:
    """A causal layer without positions, the last query's logits raised; the pass without the image is not edited."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return arguments, params

    @staticmethod
    def run(module: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        arguments, params = module
        x, heads, start = inputs["x"], arguments["heads"], arguments["img_start"]
        q, k, v = (split_heads(linear(x, params[f"{n}_proj.weight"]), heads) for n in "qkv")
        n = x.shape[1]
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        scores = (q @ k.mT * arguments["head_dim"] ** -0.5).masked_fill(future, -torch.inf)
        if not arguments.get("use_cfg", False):
            top, bottom = (torch.zeros(n, dtype=torch.bool) for _ in range(2))
            top[[start + t for t in arguments["top_tokens"]]] = True
            bottom[[start + t for t in arguments["bottom_tokens"]]] = True
            scores = emphasise(scores, top, bottom, alpha=arguments["alpha"], beta=arguments["beta"])
        weights = scores.softmax(-1)
        return {"attn": weights, "y": linear(join_heads(weights @ v), params["o_proj.weight"])}
