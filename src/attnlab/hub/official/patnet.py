"""haiduo/PartialNet (arXiv 2503.03148): partial convolutions with attention, and the network; and timm's FasterNet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.patnet import PartialBlock, PATNet
from attnlab.nn.channel.style import StyleRecalibration
from attnlab.nn.spatial.partial import PartialChannel, PartialConv, PartialSelf, PartialSpatial

_REPOSITORY, _TIMM = "haiduo/PartialNet", "huggingface/pytorch-image-models"

_STYLE: tuple[Rule, ...] = ((r"cfc1\.", "fc."), (r"(^|attention\.)bn\.", r"\1norm."))
_SPATIAL: tuple[Rule, ...] = ((r"conv_attn\.", "score."), (r"conv\.", "fc."), (r"norm\.", "norm1."))
_MIXER: tuple[Rule, ...] = (
    (r"partial_conv3\.", "conv."),
    (r"attn\.rpe_k\.lookup_table_bias$", "bias.table"),
    (r"attn\.qkv\.", "wqkv."),
    (r"attn\.proj\.", "wo."),
    (r"(^|\.)attn\.", r"\1attention."),
    *_STYLE,
)
_BLOCK: tuple[Rule, ...] = (
    (r"spatial_mixing\.", "mixer."),
    (r"mlp\.0\.", "fc1.conv."),
    (r"mlp\.1\.", "fc1.norm."),
    (r"mlp\.3\.", "fc2."),
    (r"mlp\.4\.norm\.", "spatial.norm1."),
    (r"mlp\.4\.conv_attn\.", "spatial.score."),
    (r"mlp\.4\.conv\.", "spatial.fc."),
    (r"mlp\.4\.", "spatial."),
    (r"layer_scale$", "scale"),
    *_MIXER,
)
_NETWORK: tuple[Rule, ...] = (
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^patch_embed\.", "stem."),
    (
        r"^stages\.(\d+)\.(reduction|norm)\.",
        lambda m: f"stages.{_later(m)}.downsample.{m[2].replace('reduction', 'conv')}.",
    ),
    (r"^stages\.(\d+)\.blocks\.", lambda m: f"stages.{int(m[1]) // 2}.blocks."),
    (r"^avgpool_pre_head\.1\.", "neck."),
    *_BLOCK,
)
_FASTERNET: tuple[Rule, ...] = (
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^patch_embed\.", "stem."),
    (r"downsample\.reduction\.", "downsample.conv."),
    (r"^conv_head\.", "neck."),
    (r"^classifier\.", "head."),
    *_BLOCK,
)  # fmt: skip


def _later(m: Any) -> int:
    """The authors' row alternates stages and mergings; a merging opens the stage after it."""
    return (int(m[1]) + 1) // 2


def _ours(params: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """Our names; convolutions over (mean, deviation) and of pooled maps as the linear layers that they are."""
    renamed = rename(params, rules)
    for name, tensor in renamed.items():
        if tensor.shape[2:] == (1, 2):
            renamed[name] = torch.cat(tensor[:, :, 0].unbind(-1), 1)
        elif re.search(r"(^|\.)(neck|fc|fc2|score)\.weight$", name):
            renamed[name] = tensor.flatten(1)
        elif f".{name}".endswith(".bias.table"):
            renamed[name] = tensor.mT.contiguous()
    return renamed


class _Map:
    """On maps `(B, C, H, W)`."""

    rules: tuple[Rule, ...] = ()

    @classmethod
    def rename(cls, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _ours(params, cls.rules)

    @classmethod
    def loaded(cls, module: nn.Module, params: Mapping[str, Tensor]) -> nn.Module:
        load(module, cls.rename(params))
        return module.eval()

    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


def _mixer(arguments: Mapping[str, Any], attention: bool) -> PartialConv:
    dim, parts = arguments["dim"], arguments["n_div"]
    kind = arguments.get("channel_type") if attention else None
    if kind == "self":
        return PartialSelf(dim, parts=parts, heads=4 if arguments.get("patnet_t0") else 6)
    return PartialChannel(dim, parts=parts) if kind == "se" else PartialConv(dim, parts=parts)


@official(_REPOSITORY, "SRM", ours=StyleRecalibration)
class SRM(_Map):
    rules = _STYLE

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> nn.Module:
        return SRM.loaded(StyleRecalibration(arguments["channel"]), params)


@official(_REPOSITORY, "Partial_conv3", ours=PartialConv)
class PartialConv3(_Map):
    rules = _MIXER

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> nn.Module:
        return PartialConv3.loaded(_mixer(arguments, bool(arguments.get("use_attn"))), params)


@official(_REPOSITORY, "partial_spatial_attn_layer_reverse", ours=PartialSpatial)
class Spatial(_Map):
    rules = _SPATIAL

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> nn.Module:
        if arguments.get("partial", 0.5) != 0.5:
            raise ValueError(f"partial must be 0.5, as the network has it, got {arguments['partial']}")
        return Spatial.loaded(PartialSpatial(arguments["dim"]), params)


@official(_REPOSITORY, "MLPBlock")
class MLPBlock(_Map):
    rules = _BLOCK

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> nn.Module:
        dim = arguments["dim"]
        block = PartialBlock(
            dim,
            _mixer({"patnet_t0": True, **arguments}, bool(arguments["use_channel"])),
            hidden=int(dim * arguments["mlp_ratio"]),
            activation=arguments["act_layer"].lower(),
            spatial=bool(arguments["use_spatial"]),
            separate=arguments["channel_type"] == "self",
            layer_scale=arguments.get("layer_scale_init_value") or None,
            drop_path=arguments.get("drop_path", 0.0),
        )
        return MLPBlock.loaded(block, params)


@official(_REPOSITORY, "PartialNet", ours=PATNet)
class PartialNet(_Map):
    """Images to logits."""

    rules = _NETWORK

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> nn.Module:
        net = PATNet(
            dim=arguments.get("embed_dim", 96),
            depths=arguments.get("depths", (1, 2, 8, 2)),
            mlp_ratio=arguments.get("mlp_ratio", 2.0),
            parts=arguments.get("n_div", 4),
            attention=arguments.get("use_channel_attn", True),
            spatial=arguments.get("use_spatial_attn", True),
            activation=arguments.get("act_layer", "relu").lower(),
            heads=4 if arguments.get("patnet_t0", True) else 6,
            layer_scale=arguments.get("layer_scale_init_value") or None,
            head_dim=arguments.get("feature_dim", 1280),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.1),
        )
        return PartialNet.loaded(net, params)


@official(_TIMM, "FasterNet")
class FasterNet(_Map):
    """Images to logits: the network without attention."""

    rules = _FASTERNET

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> nn.Module:
        net = PATNet(
            dim=arguments.get("embed_dim", 96),
            depths=arguments.get("depths", (1, 2, 8, 2)),
            mlp_ratio=arguments.get("mlp_ratio", 2.0),
            parts=arguments.get("n_div", 4),
            attention=False,
            separate=False,
            activation=arguments.get("activation", "relu"),
            layer_scale=arguments.get("layer_scale_init_value") or None,
            head_dim=arguments.get("feature_dim", 1280),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.1),
        )
        return FasterNet.loaded(net, params)
