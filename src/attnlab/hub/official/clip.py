"""openai/CLIP (arXiv 2103.00020) in its own layout, and in that of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.clip import CLIP as Ours

_OPENAI: tuple[Rule, ...] = (
    (r"^visual\.transformer\.resblocks\.", "image.encoder.blocks."),
    (r"^transformer\.resblocks\.", "text.encoder.blocks."),
    (r"^visual\.class_embedding$", "image.class_token"),
    (r"^visual\.positional_embedding$", "image.positions.table"),
    (r"^visual\.conv1\.", "image.patches."),
    (r"^visual\.ln_pre\.", "image.norm_pre."),
    (r"^visual\.ln_post\.", "image.encoder.norm."),
    (r"^visual\.proj$", "image.head.weight"),
    (r"^token_embedding\.", "text.words."),
    (r"^positional_embedding$", "text.positions"),
    (r"^ln_final\.", "text.encoder.norm."),
    (r"^text_projection$", "text.head.weight"),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".mixer.wqkv."),
    (r"\.attn\.out_proj\.", ".mixer.wo."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)
_TRANSFORMERS: tuple[Rule, ...] = (
    (r"^vision_model\.", "image."),
    (r"^text_model\.", "text."),
    (r"^visual_projection\.", "image.head."),
    (r"^text_projection\.", "text.head."),
    (r"^image\.embeddings\.class_embedding$", "image.class_token"),
    (r"^image\.embeddings\.position_embedding\.weight$", "image.positions.table"),
    (r"^image\.embeddings\.patch_embedding\.", "image.patches."),
    (r"^image\.pre_layrnorm\.", "image.norm_pre."),
    (r"^image\.post_layernorm\.", "image.encoder.norm."),
    (r"^text\.embeddings\.token_embedding\.", "text.words."),
    (r"^text\.embeddings\.position_embedding\.weight$", "text.positions"),
    (r"^text\.final_layer_norm\.", "text.encoder.norm."),
    (r"\.encoder\.layers\.", ".encoder.blocks."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".mixer.wo."),
)


@official("openai/CLIP", "CLIP", ours=Ours)
class CLIP:
    """Images and token ids to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From either layout, told apart by the names."""
        # Counters, and the numbers that OpenAI's files carry along.
        params = {n: t for n, t in params.items() if not re.search(r"position_ids$|^input_res|^context_l|^vocab_s", n)}
        if "visual.proj" in params:
            found = rename(params, _OPENAI)
            return {n: t.mT if n.endswith(".head.weight") else t for n, t in found.items()}
        found = {}
        for name, tensor in rename(params, _TRANSFORMERS).items():
            match = re.match(r"(.*)\.self_attn\.([qkv])_proj\.(.*)", name)
            if match is None:
                found[name] = tensor
            elif match[2] == "q":
                three = [_find(params, match, letter) for letter in "qkv"]
                found[f"{match[1]}.mixer.wqkv.{match[3]}"] = torch.cat(three)
        return found

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        model = Ours(
            dim=arguments["vision_width"],
            depth=arguments["vision_layers"],
            heads=arguments["vision_width"] // 64,
            image=arguments["image_resolution"],
            patch=arguments["vision_patch_size"],
            text_dim=arguments["transformer_width"],
            text_depth=arguments["transformer_layers"],
            text_heads=arguments["transformer_heads"],
            words=arguments["vocab_size"],
            length=arguments["context_length"],
            out_dim=arguments["embed_dim"],
        )
        load(model, CLIP.rename(params))
        return model

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = module(inputs["image"], inputs["text"])
        return {"logits_per_image": logits, "logits_per_text": logits.T}


def _find(params: Mapping[str, Tensor], match: re.Match[str], letter: str) -> Tensor:
    """The projection `letter` of the layer whose query projection `match` names, in the layout of transformers."""
    tower, layer = re.match(r"(image|text)\.encoder\.blocks\.(\d+)", match[1]).groups()  # type: ignore[union-attr]
    kind = "vision" if tower == "image" else "text"
    return params[f"{kind}_model.encoder.layers.{layer}.self_attn.{letter}_proj.{match[3]}"]
