"""facebookresearch/convit (arXiv 2103.10697), whose names timm keeps: the attention, its block, the network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.official.vit import PLAIN, flat
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.skeletons.plain import TokenBlock
from attnlab.models.vision.convit import ConViT as Ours
from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.gated_positional import GatedPositionalAttention

_REPOSITORY = "facebookresearch/convit"

_ATTENTION: tuple[Rule, ...] = (
    (r"(^|\.)qkv\.", r"\1wqkv."),
    (r"(^|\.)proj\.", r"\1wo."),
    (r"(^|\.)pos_proj\.", r"\1position_logits."),
    (r"(^|\.)gating_param$", r"\1gate"),
)


def _fused(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`qk` and `v` as one `qkv`; timm's buffer of relative places left out."""
    found = {}
    for name, tensor in params.items():
        if name.endswith("rel_indices"):
            continue
        if match := re.search(r"^(|.*\.)(qk|v)\.(weight|bias)$", name):
            if match[2] == "qk":
                found[f"{match[1]}qkv.{match[3]}"] = torch.cat((tensor, params[f"{match[1]}v.{match[3]}"]))
            continue
        found[name] = tensor
    return found


def _attention(arguments: Mapping[str, Any]) -> GatedPositionalAttention:
    return GatedPositionalAttention(
        arguments["dim"],
        heads=arguments.get("num_heads", 8),
        bias=arguments.get("qkv_bias", False),
        locality=arguments.get("locality_strength", 1.0),
        dropout=arguments.get("attn_drop", 0.0),
    )


def _norm(arguments: Mapping[str, Any]) -> partial[nn.LayerNorm]:
    found = re.search(r"eps=([\d.e-]+)", str(arguments.get("norm_layer", "")))
    return partial(nn.LayerNorm, eps=float(found[1]) if found else 1e-5)


def _side(tokens: Tensor) -> tuple[int, int]:
    side = round(tokens.shape[1] ** 0.5)
    return side, side


@official(_REPOSITORY, "GPSA", ours=GatedPositionalAttention)
class GPSA:
    """On the tokens `(B, n², C)` of a square; without parameters, as the constructor leaves it."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(_fused(params), _ATTENTION)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> GatedPositionalAttention:
        module = _attention(arguments)
        if params:
            load(module, GPSA.rename(params))
        return module

    @staticmethod
    def run(module: GatedPositionalAttention, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if inputs:
            return {"y": module(inputs["x"], grid=_side(inputs["x"]))}
        return {
            "pos_proj_weight": module.position_logits.weight,
            "v_weight": module.wqkv.weight[2 * module.dim :],
            "gating": module.gate,
        }


@official(_REPOSITORY, "Block")
class Block:
    """On the tokens `(B, n², C)` of a square, with either attention."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(_fused(params), ((r"^attn\.", "mixer."), *_ATTENTION))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> TokenBlock:
        dim, heads = arguments["dim"], arguments["num_heads"]
        plain = MultiHead(dim, heads=heads, bias=arguments.get("qkv_bias", False), out_bias=True)
        mixer = _attention(arguments) if arguments.get("use_gpsa", True) else plain
        block = TokenBlock(dim, mixer, mlp_ratio=arguments.get("mlp_ratio", 4.0), norm=_norm(arguments))
        load(block, Block.rename(params))
        return block

    @staticmethod
    def run(module: TokenBlock, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"], grid=_side(inputs["x"]))}


@official(_REPOSITORY, "VisionTransformer", ours=Ours)
@official("huggingface/pytorch-image-models", "ConVit")
class VisionTransformer:
    """Images to logits. The width is read from the parameters: some constructors multiply `embed_dim` by the heads."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rules = ((r"^cls_token$", "class_token"), *PLAIN, *_ATTENTION)
        found = flat(rename(_fused(params), rules))
        return {"late_token" if n == "class_token" else n: t for n, t in found.items()}

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        model = Ours(
            dim=params["patch_embed.proj.weight"].shape[0],
            depth=arguments.get("depth", 12),
            heads=arguments.get("num_heads", 12),
            local=arguments.get("local_up_to_layer", 10),
            locality=arguments.get("locality_strength", 1.0),
            qkv_bias=arguments.get("qkv_bias", False),
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            image=arguments.get("img_size", 224),
            patch=arguments.get("patch_size", 16),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.0),
            norm=_norm(arguments),
        )
        load(model, VisionTransformer.rename(params))
        return model

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
