"""ViTAE-Transformer/ViTAE-VSA (arXiv 2204.08446): the attention, and ViTAEv2 with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.vitaev2 import ViTAEv2
from attnlab.nn.spatial.varied_window import VariedWindowAttention

_REPOSITORY = "ViTAE-Transformer/ViTAE-VSA"

_ATTENTION: tuple[Rule, ...] = (
    (r"(^|\.)qkv\.", r"\1wqkv."),
    (r"(^|\.)proj\.", r"\1wo."),
    (r"(^|\.)relative_position_bias_table$", r"\1relative.table"),
)


def attention(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The regressions of offsets and scales as one, 1×1 convolutions as linear layers, the index table left out."""
    found = {}
    for name, tensor in params.items():
        if name.endswith("relative_position_index") or ".sampling_scales." in f".{name}":
            continue
        if ".sampling_offsets." in f".{name}":
            tensor = torch.cat((tensor, params[name.replace("sampling_offsets", "sampling_scales")]))
            name = re.sub(r"sampling_offsets\.\d+", "regress", name)
        inside = re.search(r"(^|\.)(qkv|proj|regress)\.weight$", name)
        found[name] = tensor.flatten(1) if inside else tensor
    return rename(found, _ATTENTION)


@official(_REPOSITORY, "VSAWindowAttention", ours=VariedWindowAttention)
class VSAWindowAttention:
    """Maps `(B, C, H, W)`, of any size, not the constructor's alone."""

    rename = staticmethod(attention)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> VariedWindowAttention:
        module = VariedWindowAttention(
            arguments["dim"],
            heads=arguments["num_heads"],
            window=arguments.get("window_size", 1),
            out_dim=arguments.get("out_dim"),
            bias=arguments.get("qkv_bias", True),
            scale=arguments.get("qk_scale"),
        )
        load(module, attention(params))
        return module

    @staticmethod
    def run(module: VariedWindowAttention, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


_NETWORK: tuple[Rule, ...] = (
    (r"^layers\.0\.RC\.", "stem."),
    (r"^layers\.(\d+)\.RC\.", r"stages.\1.downsample."),
    (r"^layers\.(\d+)\.NC\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.PRM\.convs\.(\d+)\.0\.", r".views.\1."),
    (r"\.PCM\.", ".convs."),
    (r"\.pos\.", ".positions."),
    (r"\.attn\.", ".attention."),
)


@official(_REPOSITORY, "ViTAE_VSA_basic", ours=ViTAEv2)
class Network:
    """Images to logits: `ViTAE_VSA_basic` with the tokens, positions and windows of the released sizes."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(attention(params), _NETWORK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> ViTAEv2:
        dims = arguments.get("token_dims", 64)
        dims = dims if isinstance(dims, (list, tuple)) else [dims * 2**i for i in range(4)]

        def per_stage(name: str, default: Any) -> list[Any]:
            value = arguments.get(name, default)
            return list(value) if isinstance(value, (list, tuple)) else [value] * len(dims)

        net = ViTAEv2(
            dims=dims,
            hidden=per_stage("embed_dims", 64),
            depths=per_stage("NC_depth", (2, 2, 6, 2)),
            heads=per_stage("NC_heads", 4),
            reduction_heads=per_stage("RC_heads", 1),
            kernels=per_stage("kernel_size", (7, 3, 3, 3)),
            dilations=per_stage("dilations", ((1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2))),
            groups=per_stage("NC_group", (1, 32, 64, 64)),
            reduction_groups=per_stage("RC_group", 1),
            strides=per_stage("downsample_ratios", (4, 2, 2, 2)),
            wide=bool(arguments.get("wide_pcm", True)),
            window=arguments.get("window_size", 7),
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.0),
        )
        load(net, Network.rename(params))
        return net

    @staticmethod
    def run(module: ViTAEv2, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
