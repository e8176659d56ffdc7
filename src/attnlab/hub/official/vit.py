"""The plain vision transformer of timm and facebookresearch/deit (arXiv 2010.11929, 2012.12877)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.vit import ViT

PLAIN: tuple[Rule, ...] = (
    (r"^patch_embed\.proj\.", "patches."),
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "positions.table"),
    (r"^blocks\.", "encoder.blocks."),
    (r"^norm\.", "encoder.norm."),
    (r"\.attn\.qkv\.", ".mixer.wqkv."),
    (r"\.attn\.proj\.", ".mixer.wo."),
    (r"\.attn\.", ".mixer."),
    (r"\.ls(\d)\.gamma$", r".scale\1"),
)


def flat(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The class token (C) and the positions (N, C) without their leading axes of one."""
    axes = {"class_token": 1, "positions.table": 2}
    return {n: t.reshape(t.shape[-axes[n] :]) if n in axes else t for n, t in params.items()}


@official("huggingface/pytorch-image-models", "VisionTransformer", ours=ViT)
@official("facebookresearch/deit", "VisionTransformer")
class VisionTransformer:
    """Images to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return flat(rename(params, PLAIN))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> ViT:
        model = ViT(
            dim=arguments.get("embed_dim", 768),
            depth=arguments.get("depth", 12),
            heads=arguments.get("num_heads", 12),
            qkv_bias=arguments.get("qkv_bias", True),
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            image=arguments.get("img_size", 224),
            patch=arguments.get("patch_size", 16),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            layer_scale=arguments.get("init_values"),
            class_token="cls_token" in params,
            norm=partial(nn.LayerNorm, eps=1e-6),
        )
        load(model, VisionTransformer.rename(params))
        return model

    @staticmethod
    def run(module: ViT, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
