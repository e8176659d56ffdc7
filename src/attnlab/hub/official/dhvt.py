"""ArieSeirack/DHVT (arXiv 2210.05958): its attention, feed-forward layer and patch embedding, and the network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.dhvt import DHVT, ConvFeedForward, PatchStem
from attnlab.nn.softmax.head_tokens import HeadTokens

_REPOSITORY = "ArieSeirack/DHVT"

_ATTENTION: tuple[Rule, ...] = (
    (r"(^|attn\.)qkv\.", r"\1wqkv."),
    (r"(^|attn\.)proj\.", r"\1wo."),
    (r"ht_proj\.", "head_in."),
    (r"ht_norm\.", "head_norm."),
    (r"(^|attn\.)pos_embed$", r"\1head_embedding"),
)
_FEED: tuple[Rule, ...] = (
    (r"(^|mlp\.)conv1\.", r"\1fc1."),
    (r"(^|mlp\.)conv2\.", r"\1conv."),
    (r"(^|mlp\.)conv3\.", r"\1fc2."),
    (r"(^|mlp\.)bn(\d)\.", r"\1norm\2."),
    (r"compress\.", "squeeze."),
    (r"excitation\.", "excite."),
)


def _stem(params: Mapping[str, Tensor], prefix: str = "") -> tuple[Rule, ...]:
    """The authors count activations between the convolutions, and we the scale before them."""
    last = len([n for n in params if n.startswith(f"{prefix}proj.") and n.endswith(".0.weight")]) + 1
    return (
        (rf"^{prefix}proj\.(\d+)\.0\.", lambda m: f"{prefix}{int(m[1]) // 2 + 1}.conv."),
        (rf"^{prefix}proj\.(\d+)\.1\.", lambda m: f"{prefix}{int(m[1]) // 2 + 1}.norm."),
        (rf"^{prefix}pre_affine\.", f"{prefix}0."),
        (rf"^{prefix}post_affine\.", f"{prefix}{last}."),
        (r"\balpha$", "weight"),
        (r"\bbeta$", "bias"),
    )


def _shaped(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without axes of length one, which the authors' parameters have for broadcasting or as 1×1 convolutions."""
    flat = {}
    for name, p in params.items():
        if name.endswith(("fc1.weight", "fc2.weight")):
            p = p.flatten(1)
        elif name.endswith("head_embedding"):
            p = p.squeeze(0)
        elif name == "class_token" or (p.ndim == 4 and len(p) == 1 and p.shape[2:] == (1, 1)):
            p = p.flatten()
        flat[name] = p
    return flat


@official(_REPOSITORY, "HI_Attention", ours=HeadTokens)
class HeadInteractedAttention:
    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _shaped(rename(params, _ATTENTION))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> HeadTokens:
        bias = arguments.get("qkv_bias", False)
        module = HeadTokens(arguments["dim"], heads=arguments.get("num_heads", 8), bias=bias, out_bias=True)
        load(module, HeadInteractedAttention.rename(params))
        return module

    @staticmethod
    def run(module: HeadTokens, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "DAFF", ours=ConvFeedForward)
class FeedForward:
    """The authors take the grid to be square."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _shaped(rename(params, _FEED))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> ConvFeedForward:
        dim = arguments["in_features"]
        module = ConvFeedForward(dim, arguments.get("hidden_features") or dim)
        load(module, FeedForward.rename(params))
        return module

    @staticmethod
    def run(module: ConvFeedForward, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        side = math.isqrt(x.shape[1] - 1)
        return {"y": module(x, grid=(side, side))}


@official(_REPOSITORY, "ConvPatchEmbed")
class PatchEmbedding:
    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _shaped(rename(params, _stem(params)))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> nn.Module:
        patch, dim = arguments.get("patch_size", 16), arguments.get("embed_dim", 768)
        module = PatchStem(arguments.get("in_chans", 3), dim, patch)
        load(module, PatchEmbedding.rename(params))
        return module

    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"]).flatten(2).mT}


@official(_REPOSITORY, "VisionTransformer", ours=DHVT)
class Network:
    """Images to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rules: tuple[Rule, ...] = (
            *_ATTENTION,
            *_FEED,
            *_stem(params, "patch_embed."),
            (r"^patch_embed\.", "stem."),
            (r"^cls_token$", "class_token"),
            (r"\.attn\.", ".mixer."),
        )
        return _shaped(rename(params, rules))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> DHVT:
        net = DHVT(
            dim=arguments.get("embed_dim", 768),
            depth=arguments.get("depth", 12),
            heads=arguments.get("num_heads", 12),
            patch=arguments.get("patch_size", 16),
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            bias=arguments.get("qkv_bias", True),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 100),
            drop_path=arguments.get("drop_path_rate", 0.0),
        )
        load(net, Network.rename(params))
        return net

    @staticmethod
    def run(module: DHVT, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
