"""MaxViT (arXiv 2204.01697) by timm's names, in which the authors' TensorFlow weights are given out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.skeletons.mbconv import MBConv as OurMBConv
from attnlab.models.skeletons.parts import MLP
from attnlab.models.skeletons.pyramid import Block
from attnlab.models.vision.maxvit import _GELU, _NORM, MultiAxisBlock
from attnlab.models.vision.maxvit import MaxViT as Ours
from attnlab.nn.spatial.multi_axis import BlockAttention, GridAttention

_REPOSITORY = "huggingface/pytorch-image-models"

_CONV: tuple[Rule, ...] = (
    (r"(^|\.)pre_norm\.", r"\1norm."),
    (r"conv1_1x1\.", "conv1."),
    (r"conv2_kxk\.", "conv2."),
    (r"conv3_1x1\.", "conv3."),
    (r"shortcut\.expand\.", "shortcut."),
)
_ATTENTION: tuple[Rule, ...] = (
    (r"(^|\.)attn\.qkv\.", r"\1mixer.wqkv."),
    (r"(^|\.)attn\.proj\.", r"\1mixer.wo."),
    (r"(^|\.)attn\.rel_pos\.relative_position_bias_table$", r"\1mixer.relative.table"),
)
_BLOCK: tuple[Rule, ...] = (*_ATTENTION, (r"attn_(block|grid)\.", r"\1."), *_CONV)
_NETWORK: tuple[Rule, ...] = (
    (r"^stem\.norm1\.", "stem.norm."),
    (r"^head\.norm\.", "head_norm."),
    (r"^head\.pre_logits\.fc\.", "head_hidden."),
    (r"^head\.fc\.", "head."),
    *_BLOCK,
)


def _ours(params: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """Renamed; tables counted key minus query turned to query minus key, the 1×1 convolutions of SE flattened."""
    found = {}
    for name, tensor in rename(params, rules).items():
        if name.endswith("relative.table"):
            tensor = tensor.flip(1, 2).flatten(1).mT
        elif re.search(r"(^|\.)se\.fc\d\.weight$", name):
            tensor = tensor.flatten(1)
        found[name] = tensor
    return found


@official(_REPOSITORY, "MbConvBlock")
class MBConv:
    """On maps `(B, C, H, W)`. The widths are those of the parameters; the stride is the argument `stride`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _ours(params, _CONV)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> OurMBConv:
        hidden, input_dim = params["conv1_1x1.weight"].shape[:2]
        dim = len(params["conv3_1x1.weight"])
        said = re.search(r"stride\D*(\d)", arguments.get("text", ""))
        stride = arguments.get("stride") or (int(said[1]) if said else 1)
        module = OurMBConv(input_dim, dim, stride=stride, expansion=hidden / dim, activation=_GELU, norm=_NORM)
        load(module, MBConv.rename(params))
        return module.eval()

    @staticmethod
    def run(module: OurMBConv, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "PartitionAttentionCl")
class PartitionAttention:
    """On maps `(B, H, W, C)`; the argument `partition_type` is "block" or "grid"."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _ours(params, _ATTENTION)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Block:
        dim = arguments["dim"]
        heads, side, _ = params["attn.rel_pos.relative_position_bias_table"].shape
        mixer = GridAttention if arguments.get("partition_type", "block") == "grid" else BlockAttention
        mlp = MLP(dim, len(params["mlp.fc1.weight"]), activation=_GELU)
        block = Block(dim, mixer(dim, heads=heads, window=(side + 1) // 2), layout="tokens", mlp=mlp)
        load(block, PartitionAttention.rename(params))
        return block.eval()

    @staticmethod
    def run(module: Block, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)}


@official(_REPOSITORY, "MaxxVitBlock")
class MaxxVitBlock:
    """On maps `(B, C, H, W)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _ours(params, _BLOCK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> MultiAxisBlock:
        input_dim, dim = params["conv.conv1_1x1.weight"].shape[1], len(params["conv.conv3_1x1.weight"])
        heads, side, _ = params["attn_block.attn.rel_pos.relative_position_bias_table"].shape
        block = MultiAxisBlock(
            input_dim, dim, stride=arguments.get("stride", 1), window=(side + 1) // 2, head_dim=dim // heads
        )
        load(block, MaxxVitBlock.rename(params))
        return block.eval()

    @staticmethod
    def run(module: MultiAxisBlock, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "MaxxVit", ours=Ours)
class MaxxVit:
    """Images to logits: the `maxvit_*_tf` models. Everything but drop path is read off the parameters."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _ours(params, _NETWORK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        depths: dict[int, int] = {}
        for name in params:
            if place := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name):
                depths[int(place[1])] = max(depths.get(int(place[1]), 0), int(place[2]) + 1)
        first = "stages.0.blocks.0."
        heads, side, _ = params[first + "attn_block.attn.rel_pos.relative_position_bias_table"].shape
        dim, (stem_dim, in_channels) = (
            len(params[first + "conv.conv3_1x1.weight"]),
            params["stem.conv1.weight"].shape[:2],
        )
        net = Ours(
            dim=dim,
            depths=[depths[stage] for stage in sorted(depths)],
            stem_dim=stem_dim,
            window=(side + 1) // 2,
            head_dim=dim // heads,
            in_channels=in_channels,
            num_classes=len(params.get("head.fc.weight", torch.empty(0))),
            drop_path=arguments.get("drop_path_rate", 0.0),
            dropout=arguments.get("drop_rate", 0.0),
        )
        load(net, MaxxVit.rename(params))
        return net.eval()

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
