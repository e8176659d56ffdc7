"""ysj9909/SHViT (arXiv 2401.16456): single-head attention, block, patch merging and network; and timm's network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.shvit import ConvMerging, SingleHeadBlock
from attnlab.models.vision.shvit import SHViT as Ours
from attnlab.nn.spatial.single_head import SingleHeadAttention

_REPOSITORY, _TIMM = "ysj9909/SHViT", "huggingface/pytorch-image-models"

_BLOCK: tuple[Rule, ...] = (
    (r"(^|\.)m\.", r"\1"),
    (r"(^|\.)c\.weight$", r"\1conv.weight"),
    (r"(^|\.)bn\.", r"\1norm."),
    (r"(^|\.)pre_norm\.", r"\1norm."),
    (r"(^|\.)qkv\.", r"\1wqkv."),
    (r"(^|\.)proj\.1\.", r"\1wo."),
    (r"(^|\.)ffn\.", r"\1mlp."),
    (r"(^|\.)pw(\d)\.", r"\1fc\2."),
)
# timm's names, to which the authors' are brought first.
_NETWORK: tuple[Rule, ...] = (
    (r"^patch_embed\.(\d+)\.", lambda m: f"stem.{int(m[1]) // 2}."),
    (r"downsample\.0\.", "downsample.before.conv."),
    (r"downsample\.1\.", "downsample.before.ffn."),
    (r"downsample\.2\.", "downsample.merge."),
    (r"downsample\.3\.", "downsample.behind.conv."),
    (r"downsample\.4\.", "downsample.behind.ffn."),
    (r"^head\.bn\.", "head_norm."),
    (r"^head\.l\.", "head."),
    (r"^head_dist\.bn\.", "second_norm."),
    (r"^head_dist\.l\.", "second_head."),
    *_BLOCK,
)
_ROW = re.compile(r"^blocks(\d)\.(\d+)\.(\d(?=\.m\.))?")


def _placed(name: str) -> str:
    """The authors' rows of blocks as stages: later ones begin with what shrinks the map, in three parts."""
    found = _ROW.match(name)
    if found is None:
        return name
    stage, place, inner = int(found[1]) - 1, int(found[2]), found[3]
    if stage == 0 or place > 2:
        return f"stages.{stage}.blocks.{place - 3 * bool(stage)}.{name[found.end() :]}"
    rest = name[found.end() :].removeprefix(".")
    first = 2 if place == 1 else int(inner or 0) + 3 * (place == 2)
    return f"stages.{stage}.downsample.{first}.{rest}"


def _renamed(params: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """Our names; the squeezing 1×1 convolutions become the linear layers that they are."""
    return {n: t.flatten(1) if ".se." in f".{n}" and t.ndim == 4 else t for n, t in rename(params, rules).items()}


class _Module:
    """On maps `(B, C, H, W)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params, _BLOCK)

    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "SHSA", ours=SingleHeadAttention)
class SHSA(_Module):
    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> SingleHeadAttention:
        module = SingleHeadAttention(arguments["dim"], width=arguments["pdim"], key_dim=arguments["qk_dim"])
        load(module, SHSA.rename(params))
        return module.eval()


@official(_REPOSITORY, "BasicBlock")
class BasicBlock(_Module):
    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> SingleHeadBlock:
        mixer = None
        if arguments["type"] == "s":
            mixer = SingleHeadAttention(arguments["dim"], width=arguments["pdim"], key_dim=arguments["qk_dim"])
        block = SingleHeadBlock(arguments["dim"], mixer)
        load(block, BasicBlock.rename(params))
        return block.eval()


@official(_REPOSITORY, "PatchMerging")
class PatchMerging(_Module):
    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> ConvMerging:
        module = ConvMerging(arguments["dim"], arguments["out_dim"])
        load(module, PatchMerging.rename(params))
        return module.eval()


@official(_REPOSITORY, "SHViT", ours=Ours)
@official(_TIMM, "SHViT")
class SHViT(_Module):
    """Images to logits; the authors' names and timm's."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed({_placed(name): tensor for name, tensor in params.items()}, _NETWORK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        net = Ours(
            dims=arguments.get("embed_dim", (128, 256, 384)),
            depths=arguments.get("depth", (1, 2, 3)),
            widths=arguments.get("partial_dim", (32, 64, 96)),
            key_dim=arguments.get("qk_dim", (16, 16, 16)),
            attends=[kind == "s" for kind in arguments.get("types", "sss")],
            distilled="head_dist.l.weight" in params,
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
        )
        load(net, SHViT.rename(params))
        return net.eval()
