"""dingmyu/davit (arXiv 2204.03645): channel attention, both blocks and the network; and timm's network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.davit import CHANNEL, SPATIAL, DualBlock
from attnlab.models.vision.davit import DaViT as Ours
from attnlab.nn.channel.channel_group import ChannelGroupAttention
from attnlab.nn.spatial.multi_axis import BlockAttention

_REPOSITORY, _TIMM = "dingmyu/davit", "huggingface/pytorch-image-models"

_ATTENTION: tuple[Rule, ...] = ((r"(^|\.)qkv\.", r"\1wqkv."), (r"(^|\.)proj\.", r"\1wo."))
_BLOCK: tuple[Rule, ...] = (
    (r"(^|\.)cpe\.(\d)\.proj\.", r"\1places.\2."),
    (r"(^|\.)attn\.qkv\.", r"\1mixer.wqkv."),
    (r"(^|\.)attn\.proj\.", r"\1mixer.wo."),
)
_NETWORK: tuple[Rule, ...] = (
    (r"^patch_embeds\.0\.norm\.", "stem.norm."),
    (r"^patch_embeds\.0\.proj\.", "stem.conv."),
    (r"^patch_embeds\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^patch_embeds\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
    (r"^norms\.", "head_norm."),
    *_BLOCK,
)
_PEER: tuple[Rule, ...] = (
    (r"^stages\.(\d+)\.blocks\.(\d+)\.(\d+)\.", r"main_blocks.\1.\2.\3."),
    (r"\.cpe(\d)\.", lambda m: f".cpe.{int(m[1]) - 1}."),
    (r"^head\.norm\.", "norms."),
    (r"^head\.fc\.", "head."),
    (r"^stem\.conv\.", "patch_embeds.0.proj."),
    (r"^stem\.norm\.", "patch_embeds.0.norm."),
    (r"^stages\.(\d+)\.downsample\.conv\.", r"patch_embeds.\1.proj."),
    (r"^stages\.(\d+)\.downsample\.norm\.", r"patch_embeds.\1.norm."),
)


def _flat(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' rounds of blocks, main_blocks.stage.round.turn, in one row: stages.stage.blocks.number."""
    turns = 1 + max((int(m[1]) for n in params if (m := re.match(r"main_blocks\.\d+\.\d+\.(\d+)\.", n))), default=0)

    def number(m: re.Match[str]) -> str:
        return f"stages.{m[1]}.blocks.{int(m[2]) * turns + int(m[3])}."

    return rename(params, ((r"^main_blocks\.(\d+)\.(\d+)\.(\d+)\.", number), *_NETWORK))


@official(_REPOSITORY, "ChannelAttention", ours=ChannelGroupAttention)
class ChannelAttention:
    """On tokens `(B, N, C)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, _ATTENTION)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> ChannelGroupAttention:
        module = ChannelGroupAttention(arguments["dim"], heads=arguments.get("num_heads", 8), bias="qkv.bias" in params)
        load(module, ChannelAttention.rename(params))
        return module

    @staticmethod
    def run(module: ChannelGroupAttention, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


class _Block:
    """On tokens `(B, H·W, C)`; the map's size comes as an input `size`, or in the words of the call: "(5,6)"."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, _BLOCK)

    @staticmethod
    def mixer(arguments: dict[str, Any], bias: bool) -> torch.nn.Module:
        raise NotImplementedError

    @classmethod
    def build(cls, arguments: dict[str, Any], params: dict[str, Tensor]) -> tuple[DualBlock, tuple[int, int] | None]:
        dim = arguments["dim"]
        ratio = len(params["mlp.fc1.weight"]) / dim if "mlp.fc1.weight" in params else 0
        block = DualBlock(dim, cls.mixer(arguments, "attn.qkv.bias" in params), mlp_ratio=ratio)
        load(block, cls.rename(params))
        said = re.search(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)", arguments.get("call", ""))
        return block.eval(), (int(said[1]), int(said[2])) if said else None

    @staticmethod
    def run(module: tuple[DualBlock, tuple[int, int] | None], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        block, grid = module
        if "size" in inputs:
            grid = (int(inputs["size"][0]), int(inputs["size"][1]))
        if grid is None:
            raise ValueError("the map's size must be given: an input 'size', or a call that says (H,W)")
        x = inputs["x"].unflatten(1, grid).permute(0, 3, 1, 2)
        return {"y": block(x).permute(0, 2, 3, 1).flatten(1, 2)}


@official(_REPOSITORY, "ChannelBlock")
class ChannelBlock(_Block):
    @staticmethod
    def mixer(arguments: dict[str, Any], bias: bool) -> torch.nn.Module:
        return ChannelGroupAttention(arguments["dim"], heads=arguments["num_heads"], bias=bias)


@official(_REPOSITORY, "SpatialBlock")
class SpatialBlock(_Block):
    @staticmethod
    def mixer(arguments: dict[str, Any], bias: bool) -> torch.nn.Module:
        return BlockAttention(
            arguments["dim"], heads=arguments["num_heads"], window=arguments.get("window_size", 7), bias=bias,
            biased=False, see_filling=True,
        )  # fmt: skip


@official(_REPOSITORY, "DaViT", ours=Ours)
class DaViT:
    """Images to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _flat(params)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        net = Ours(
            dim=arguments.get("embed_dims", (64, 128, 192, 256)),
            depths=arguments.get("depths", (1, 1, 3, 1)),
            heads=arguments.get("num_heads", (3, 6, 12, 24)),
            window=arguments.get("window_size", 7),
            mixers=arguments.get("attention_types", (SPATIAL, CHANNEL)),
            mlp_ratio=arguments.get("mlp_ratio", 4.0) if arguments.get("ffn", True) else 0,
            bias=arguments.get("qkv_bias", True),
            patch=arguments.get("patch_size", 4),
            overlap=arguments.get("overlapped_patch", False),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.1),
        )
        load(net, DaViT.rename(params))
        return net.eval()

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_TIMM, "DaVit")
class TimmDaViT(DaViT):
    """timm's network of the first version of channel attention (not Florence-2's), with the norm after pooling."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _flat(rename(params, _PEER))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        wanted = {"channel_attn_v2": False, "cpe_act": False, "head_norm_first": False, "named_blocks": False}
        if other := [name for name, value in wanted.items() if arguments.get(name, value) != value]:
            raise ValueError(f"{', '.join(other)} must be False: that is the vision tower of Florence-2, got True")
        theirs = {"embed_dims": (96, 192, 384, 768), "attention_types": arguments.get("attn_types", (SPATIAL, CHANNEL))}
        theirs["overlapped_patch"] = arguments.get("down_kernel_size", 2) == 3
        given = {n: v for n, v in arguments.items() if n not in ("attn_types", "down_kernel_size")}
        return DaViT.build({"drop_path_rate": 0.0, **theirs, **given}, rename(params, _PEER))
