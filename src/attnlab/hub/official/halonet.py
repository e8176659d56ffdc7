"""timm's halo attention and the networks around it (arXiv 2103.12731)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.halonet import SIZES, HaloNet, multiple_of_8
from attnlab.nn.spatial.halo import HaloAttention

_ATTENTION: tuple[Rule, ...] = (
    (r"(^|\.)q\.", r"\1wq."),
    (r"(^|\.)kv\.", r"\1wkv."),
    (r"pos_embed\.height_rel$", "rows"),
    (r"pos_embed\.width_rel$", "columns"),
)
_NETWORK: tuple[Rule, ...] = (
    (r"^(stages\.\d+)\.(\d+)\.", r"\1.blocks.\2."),
    (r"conv1_1x1\.", "narrow."),
    (r"conv2_kxk\.", "mix."),
    (r"conv3_1x1\.", "out."),
    (r"self_attn\.", "mix.0."),
    (r"post_attn\.", "mix.1."),
    (r"\.attn\.", ".gate."),
    (r"^final_conv\.", "norm."),
    (r"^head\.fc\.", "head."),
    (r"(^|\.)bn\.", r"\1norm."),
    *_ATTENTION,
)


def _flat(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The 1×1 convolutions that are linear layers here."""
    linear = ("wq.weight", "wkv.weight", "gate.fc1.weight", "gate.fc2.weight")
    return {n: t.flatten(1) if n.endswith(linear) else t for n, t in params.items()}


@official("timm", "HaloAttn", ours=HaloAttention)
class HaloAttn:
    """Maps `(B, C, H, W)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _flat(rename(params, _ATTENTION))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> HaloAttention:
        dim, heads = arguments["dim"], arguments.get("num_heads", 8)
        out_dim = arguments.get("dim_out") or dim
        module = HaloAttention(
            dim,
            out_dim=out_dim,
            heads=heads,
            head_dim=arguments.get("dim_head") or multiple_of_8(out_dim * arguments.get("qk_ratio", 1.0)) // heads,
            block=arguments.get("block_size", 8),
            halo=arguments.get("halo_size", 3),
            stride=arguments.get("stride", 1),
            bias=arguments.get("qkv_bias", False),
            average=arguments.get("avg_down", False),
            scale_positions=arguments.get("scale_pos_embed", False),
        )
        load(module, HaloAttn.rename(params))
        return module

    @staticmethod
    def run(module: HaloAttention, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official("huggingface/pytorch-image-models", *SIZES, ours=HaloNet)
class Network:
    """Images to logits, by the name of a size and the keywords that change it."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tiered = "stem.conv2.conv.weight" in params
        alone = () if tiered else ((r"^stem\.(conv\d?\.)?(conv|bn)\.", r"stem.\2."),)
        return _flat(rename(params, (*alone, *_NETWORK)))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> HaloNet:
        size = SIZES[arguments["case_name"]]
        changes = {n: arguments[n] for n in ("num_classes",) if n in arguments}
        net = HaloNet(**{**size.arguments, **changes})
        load(net, Network.rename(params))
        return net

    run = HaloAttn.run
