"""ChuanyangZheng/L2ViT (arXiv 2501.16182): linear attention, both blocks and the network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.davit import DualBlock
from attnlab.models.vision.l2vit import GLOBAL, LOCAL, GlobalBlock, Stem
from attnlab.models.vision.l2vit import L2ViT as Ours
from attnlab.nn.linear.clamped import ClampedLinearAttention
from attnlab.nn.spatial.multi_axis import BlockAttention

_REPOSITORY = "ChuanyangZheng/L2ViT"

_ATTENTION: tuple[Rule, ...] = (
    (r"(^|\.)qkv\.", r"\1wqkv."),
    (r"(^|\.)proj\.", r"\1wo."),
    (r"(^|\.)temperature$", r"\1scale"),
)
_BLOCK: tuple[Rule, ...] = (
    (r"(^|\.)attn\.qkv\.", r"\1mixer.wqkv."),
    (r"(^|\.)attn\.proj\.", r"\1mixer.wo."),
    (r"(^|\.)attn\.temperature$", r"\1mixer.scale"),
    (r"(^|\.)local_mp\.bn\.", r"\1concentrate.norm."),
    (r"(^|\.)local_mp\.", r"\1concentrate."),
)
_NETWORK: tuple[Rule, ...] = (
    (r"^downsample_layers\.0\.proj\.proj\.0\.", "stem.conv1."),
    (r"^downsample_layers\.0\.proj\.proj\.1\.", "stem.norm1."),
    (r"^downsample_layers\.0\.proj\.proj\.3\.", "stem.conv2."),
    (r"^downsample_layers\.0\.proj\.proj\.4\.", "stem.norm2."),
    (r"^downsample_layers\.0\.proj\.", "stem.conv."),
    (r"^downsample_layers\.0\.norm\.", "stem.norm."),
    (r"^downsample_layers\.(\d)\.proj\.", r"stages.\1.downsample.conv."),
    (r"^downsample_layers\.(\d)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    *_BLOCK,
)
_PLACE = re.compile(r"(^|\.)cpe\.(\d)\.proj\.")


def _renamed(params: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """Our names: a block with windows has two place convolutions, one with linear attention has one."""
    two = {n[: m.start()] for n in params if (m := _PLACE.search(n)) and m[2] == "1"}

    def place(name: str) -> str:
        m = _PLACE.search(name)
        if m is None:
            return name
        ours = f"places.{m[2]}." if name[: m.start()] in two else "place."
        return f"{name[: m.start()]}{m[1]}{ours}{name[m.end() :]}"

    renamed = rename({place(n): t for n, t in params.items()}, rules)
    return {n: t.flatten() if n.endswith("scale") else t for n, t in renamed.items()}


@official(_REPOSITORY, "LinearAttention", ours=ClampedLinearAttention)
class LinearAttention:
    """On tokens (B, N, C)."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params, _ATTENTION)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> ClampedLinearAttention:
        module = ClampedLinearAttention(
            arguments["dim"], heads=arguments.get("num_heads", 8), bias=arguments.get("qkv_bias", False)
        )
        load(module, LinearAttention.rename(params))
        return module

    @staticmethod
    def run(module: ClampedLinearAttention, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


class _Block:
    """On tokens (B, H·W, C); the map's size comes in the words of the call: "(6,7)"."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params, _BLOCK)

    @staticmethod
    def module(arguments: dict[str, Any]) -> nn.Module:
        raise NotImplementedError

    @classmethod
    def build(cls, arguments: dict[str, Any], params: dict[str, Tensor]) -> tuple[nn.Module, tuple[int, int]]:
        _refuse(arguments, {"qkv_bias": True, "ffn": True, "cpe_act": False})
        said = re.search(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)", arguments.get("call", ""))
        if said is None:
            raise ValueError("the map's size must be given: a call that says (H,W)")
        block = cls.module(arguments)
        load(block, cls.rename(params))
        return block.eval(), (int(said[1]), int(said[2]))

    @staticmethod
    def run(module: tuple[nn.Module, tuple[int, int]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        block, grid = module
        x = inputs["x"].unflatten(1, grid).permute(0, 3, 1, 2)
        return {"y": block(x).permute(0, 2, 3, 1).flatten(1, 2)}


@official(_REPOSITORY, "LGABlock")
class LGABlock(_Block):
    @staticmethod
    def module(arguments: dict[str, Any]) -> nn.Module:
        return GlobalBlock(
            arguments["dim"], heads=arguments["num_heads"], mlp_ratio=arguments.get("mlp_ratio", 4.0),
            concentrate=arguments.get("enhanced", False),
        )  # fmt: skip


@official(_REPOSITORY, "LWABlock")
class LWABlock(_Block):
    @staticmethod
    def module(arguments: dict[str, Any]) -> nn.Module:
        mixer = BlockAttention(
            arguments["dim"], heads=arguments["num_heads"], window=arguments.get("window_size", 7), biased=False,
            see_filling=True,
        )  # fmt: skip
        return DualBlock(arguments["dim"], mixer, mlp_ratio=arguments.get("mlp_ratio", 4.0))


_TURNS = {"local": (LOCAL,), "enhanced_vit": (GLOBAL,), "mix_local_enhanced_vit": (LOCAL, GLOBAL)}


@official(_REPOSITORY, "L2ViT", ours=Ours)
class L2ViT:
    """Images to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params, _NETWORK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        _refuse(
            arguments,
            {"conv_stem_type": "2L", "stem_overlapped": False, "overlapped": False, "cpe_act": False,
             "last_proj": False},
        )  # fmt: skip
        kind = arguments.get("block_type", "convnext")
        if kind not in _TURNS:
            raise ValueError(f"block_type must be one of {', '.join(_TURNS)}, got {kind!r}")
        net = Ours(
            dims=arguments.get("dims", (96, 192, 384, 768)),
            depths=arguments.get("depths", (2, 2, 6, 2)),
            heads=arguments.get("num_heads", (3, 6, 12, 24)),
            mlp_ratio=arguments.get("mlp_ratio", arguments.get("mlp_ratios", (4.0,) * 4)),
            window=arguments.get("window_size", 7),
            blocks=_TURNS[kind],
            convolutional=arguments.get("conv_stem", False),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.0),
        )
        load(net, L2ViT.rename(params))
        return net.eval()

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        # The stem as the authors run it: contiguous maps, then tokens. With a single image, torch's batch norm in
        # evaluation misreads the gradient that comes back then, and so do recorded gradients; our own forward, on
        # channels-last maps, is not touched by that.
        stem, x = module.stem, inputs["x"]
        if not isinstance(stem, Stem):
            return {"y": module(x)}
        maps = stem.convolve(x.contiguous())
        tokens = F.layer_norm(maps.flatten(2).transpose(1, 2), maps.shape[1:2], stem.norm.weight, stem.norm.bias)
        maps = tokens.transpose(1, 2).unflatten(2, maps.shape[2:])
        for stage in module.stages:
            maps = stage(maps)
        return {"y": module.forward_head(maps)}


def _refuse(arguments: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if arguments.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r}, got {arguments[name]!r}")
