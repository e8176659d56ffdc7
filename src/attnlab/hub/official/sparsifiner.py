"""lim142857/Sparsifiner (arXiv 2303.13755): its attention and its network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.official.vit import PLAIN, flat
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.sparsifiner import Sparsifiner as Ours
from attnlab.nn.sparse.predicted import PredictedAttention
from attnlab.nn.tokens.reorganize import budget, class_attention, strongest

_REPOSITORY = "lim142857/Sparsifiner"

_PREDICTOR: tuple[Rule, ...] = (
    (r"mask_predictor\.proj_c_([qk])\.", r"predictor.w\1."),
    (r"mask_predictor\.proj_n$", "predictor.down"),
    (r"mask_predictor\.proj_back_n$", "predictor.back"),
)
_ATTENTION: tuple[Rule, ...] = ((r"^qkv\.", "wqkv."), (r"^proj\.", "wo."), *_PREDICTOR)


def _settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The `cfg`'s SPAR in words: "basis threshold 0.02, basis-coef top-4, attn-score top-k"."""
    words = str(arguments.get("cfg", ""))
    found: dict[str, Any] = {"floor": 0.02, "top": 4 if "as attention_eval" in words else 8}
    if m := re.search(r"basis threshold ([\d.e-]+)", words):
        found["floor"] = float(m[1].rstrip("."))
    if m := re.search(r"basis-coef top-(\d+)", words):
        found["top"] = int(m[1])
    elif m := re.search(r"basis-coef threshold ([\d.e-]+)", words):
        found["top"], found["coefficient_floor"] = None, float(m[1].rstrip("."))
    if m := re.search(r"attn-score threshold ([\d.e-]+)", words):
        found["above"] = float(m[1].rstrip("."))
    return found


def _widths(params: Mapping[str, Tensor], start: str = "") -> dict[str, Any]:
    down, back = (params[f"{start}mask_predictor.{name}"] for name in ("proj_n", "proj_back_n"))
    return {"hidden": len(params[f"{start}mask_predictor.proj_c_q.bias"]), "shared": torch.equal(down, back)}


class Pruning(nn.Module):
    """An attention, and how many patches stay behind it; None where none leave."""

    def __init__(self, attention: PredictedAttention, left: int | None) -> None:
        super().__init__()
        self.attention, self.left = attention, left


@official(_REPOSITORY, "Attention")
class Attention:
    """On tokens, the class token first. Its outputs are those of the official dict."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Pruning:
        tokens = arguments.get("num_tokens", 197)
        module = PredictedAttention(
            arguments["dim"],
            heads=arguments.get("num_heads", 8),
            tokens=tokens,
            keep=arguments.get("attn_keep_rate", 0.25),
            reduce=arguments.get("reduce_n_factor", 8),
            bias="qkv.bias" in params,
            **_widths(params),
            **_settings(arguments),
        )
        load(module, rename(params, _ATTENTION))
        left = budget(tokens - 1, arguments["token_keep_rate"]) if arguments.get("token_pruning_this_layer") else None
        return Pruning(module.eval(), left)

    @staticmethod
    def run(module: Pruning, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        previous = inputs.get("prev_token_mask")
        alive, left = None, None
        if previous is not None:
            alive, left = torch.cat((torch.ones_like(previous[:, :1]), previous), 1), int(previous[0].sum())
        found = module.attention.connect(inputs["x"], alive, left=left)
        coefficients, approximation, mask, _ = found.connectivity
        scores = (found.q * found.q.shape[-1] ** -0.5) @ found.k.mT
        seen = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
        outputs = {
            "x": found.y,
            "basis_coef": coefficients,
            "approx_attn": approximation,
            "attn_mask": seen.to(scores.dtype),
            "masked_attn": scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(),
            "unmasked_attn": scores.softmax(-1),
        }
        if module.left is not None:
            score = class_attention(found.q, found.k)
            score = score if previous is None else score.masked_fill(~previous, -torch.inf)
            kept = strongest(score, module.left)
            outputs["token_mask"] = torch.zeros_like(score, dtype=torch.bool).scatter(1, kept, True)
        elif previous is not None:
            outputs["token_mask"] = previous
        return outputs


@official(_REPOSITORY, "Sparsifiner", ours=Ours)
class Sparsifiner:
    """Images to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return flat(rename(params, (*PLAIN, *_PREDICTOR)))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        depth = arguments.get("depth", 12)
        places = arguments.get("token_pruning_loc_indicator") or [False] * depth
        drop_at = [layer for layer, here in enumerate(places) if here]
        rates = arguments.get("token_keep_rate_list") or [1.0] * depth
        net = Ours(
            dim=arguments.get("embed_dim", 768),
            depth=depth,
            heads=arguments.get("num_heads", 12),
            keep=arguments.get("attn_keep_rate_list") or 1.0,
            drop_at=drop_at,
            keep_tokens=[rates[layer] for layer in drop_at],
            reduce=arguments.get("reduce_n_factor", 8),
            qkv_bias=arguments.get("qkv_bias", True),
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            image=arguments.get("img_size", 224),
            patch=arguments.get("patch_size", 16),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.0),
            predicted={**_widths(params, "blocks.0.attn."), **_settings(arguments)},
        )
        load(net, Sparsifiner.rename(params))
        return net

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        out = module.outputs(inputs["x"])
        return {"logits": out.logits, "features": out.tokens}
