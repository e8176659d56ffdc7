"""NVlabs/GCVit (arXiv 2206.09959): both window attentions, the query generator, downsampling, a level, the network.

And timm's network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.gcvit import ContextBlock, ContextStage
from attnlab.models.vision.gcvit import GCViT as Ours
from attnlab.models.vision.gcvit import ReduceSize as OurReduceSize
from attnlab.nn.spatial.global_query import GlobalQueryAttention, QueryGenerator
from attnlab.nn.spatial.groups import GroupAttention
from attnlab.nn.spatial.multi_axis import BlockAttention

_REPOSITORY, _TIMM = "NVlabs/GCVit", "huggingface/pytorch-image-models"

_FUSED: tuple[Rule, ...] = (
    (r"(^|\.)conv\.0\.", r"\1mix.conv1."),
    (r"(^|\.)conv\.2\.fc\.0\.", r"\1mix.se.fc1."),
    (r"(^|\.)conv\.2\.fc\.2\.", r"\1mix.se.fc2."),
    (r"(^|\.)conv\.3\.", r"\1mix.conv2."),
    (r"(^|\.)reduction\.", r"\1conv."),
)
_QUERIES: tuple[Rule, ...] = (
    *_FUSED,
    (r"(^|\.)(?:q_global_gen\.)?to_q_global\.(\d+)\.mix\.", r"\1queries.blocks.\2."),
)
_ATTENTION: tuple[Rule, ...] = (
    (r"(^|\.)qkv\.", r"\1wqkv."),
    (r"(^|\.)proj\.", r"\1wo."),
    (r"(^|\.)relative_position_bias_table$", r"\1relative.table"),
)
_LEVEL: tuple[Rule, ...] = (
    *_QUERIES,
    (r"(^|\.)attn\.qkv\.", r"\1mixer.wqkv."),
    (r"(^|\.)attn\.proj\.", r"\1mixer.wo."),
    (r"(^|\.)attn\.relative_position_bias_table$", r"\1mixer.relative.table"),
    (r"(^|\.)gamma(\d)$", r"\1scale\2"),
)
_NETWORK: tuple[Rule, ...] = (
    (r"^patch_embed\.proj\.", "stem.0."),
    (r"^patch_embed\.conv_down\.", "stem.1."),
    (r"^levels\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^levels\.", "stages."),
    *_LEVEL,
)
_PEER: tuple[Rule, ...] = (
    (r"^stem\.conv1\.", "stem.0."),
    (r"^stem\.down\.", "stem.1."),
    (r"(^|\.)global_block\.blocks\.conv(\d+)\.", lambda m: f"{m[1]}queries.blocks.{int(m[2]) - 1}."),
    (r"(^|\.)conv_block\.", r"\1mix."),
    (r"(^|\.)conv_dw\.", r"\1conv1."),
    (r"(^|\.)conv_pw\.", r"\1conv2."),
    (r"(^|\.)reduction\.", r"\1conv."),
    (r"attn\.rel_pos\.", "attn."),
    (r"(^|\.)ls(\d)\.gamma$", r"\1gamma\2"),
    (r"^stages\.\d+\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
    *_LEVEL[len(_QUERIES) :],
)


def _ours(params: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """Renamed, without the saved indices; the projection of global attention, without queries, is called `wkv`."""
    renamed, found = rename(params, rules), {}
    for name, tensor in renamed.items():
        if name.endswith("relative_position_index"):
            continue
        if re.search(r"(^|\.)wqkv\.", name):
            rows, width = renamed[re.sub(r"bias$", "weight", name)].shape
            name = name if rows == 3 * width else name.replace("wqkv.", "wkv.")
        elif re.search(r"(^|\.)(se\.fc\d)\.weight$", name):
            tensor = tensor.flatten(1)
        found[name] = tensor
    return found


def _levels(resolution: int, window: int) -> int:
    return max(round(math.log2(resolution / window)), 0)


class _Attention:
    """On the tokens of windows, `(B · windows, w², C)`, all of them one group each."""

    mixer: type[GroupAttention]
    options: dict[str, Any] = {}

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _ours(params, _ATTENTION)

    @classmethod
    def build(cls, arguments: dict[str, Any], params: dict[str, Tensor]) -> GroupAttention:
        heads, window = arguments["num_heads"], arguments["window_size"]
        module = cls.mixer(arguments["dim"], heads=heads, window=window, bias="qkv.bias" in params, **cls.options)
        load(module, cls.rename(params))
        return module.eval()

    @staticmethod
    def run(module: GroupAttention, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        grid = (module.window, module.window)
        if "q_global" not in inputs:
            return {"y": module(inputs["x"], grid=grid)}
        x, queries = inputs["x"], inputs["q_global"].squeeze(1)
        return {"y": module(x, grid=grid, queries=queries.repeat_interleave(len(x) // len(queries), 0))}


@official(_REPOSITORY, "WindowAttention")
class WindowAttention(_Attention):
    mixer = BlockAttention


@official(_REPOSITORY, "WindowAttentionGlobal")
class WindowAttentionGlobal(_Attention):
    mixer, options = GlobalQueryAttention, {"levels": None}


@official(_REPOSITORY, "GlobalQueryGen")
class GlobalQueryGen:
    """Maps `(B, C, H, W)` to queries `(B, 1, heads, w², D)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n.removeprefix("queries."): t for n, t in _ours(params, _QUERIES).items()}

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> QueryGenerator:
        window = arguments["window_size"]
        module = QueryGenerator(
            arguments["dim"], heads=arguments["num_heads"], window=window,
            levels=_levels(arguments["input_resolution"], window),
        )  # fmt: skip
        load(module, GlobalQueryGen.rename(params))
        return module.eval()

    @staticmethod
    def run(module: QueryGenerator, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])[:, None]}


@official(_REPOSITORY, "ReduceSize")
class ReduceSize:
    """On maps `(B, H, W, C)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _ours(params, _FUSED)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> OurReduceSize:
        dim = arguments["dim"]
        module = OurReduceSize(dim, dim if arguments.get("keep_dim", False) else 2 * dim)
        load(module, ReduceSize.rename(params))
        return module.eval()

    @staticmethod
    def run(module: OurReduceSize, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)}


@official(_REPOSITORY, "GCViTLayer")
class GCViTLayer:
    """On maps `(B, H, W, C)`; it shrinks the map at its end, where ours does at the beginning of the next stage."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {re.sub(r"^(queries|blocks)", r"0.\1", n): t for n, t in _ours(params, _LEVEL).items()}
        return {re.sub(r"^downsample", "1", n): t for n, t in found.items()}

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> nn.Sequential:
        dim, heads, window = (arguments[n] for n in ("dim", "num_heads", "window_size"))

        def block(index: int) -> ContextBlock:
            return ContextBlock(
                dim, heads=heads, window=window, local=index % 2 == 0, bias=arguments.get("qkv_bias", True),
                mlp=arguments.get("mlp_ratio", 4.0), layer_scale=arguments.get("layer_scale"),
            )  # fmt: skip

        levels = _levels(arguments["input_resolution"], window)
        queries = QueryGenerator(dim, heads=heads, window=window, levels=levels)
        blocks = nn.Sequential(*(block(index) for index in range(arguments["depth"])))
        down = OurReduceSize(dim, 2 * dim) if arguments.get("downsample", True) else nn.Identity()
        module = nn.Sequential(ContextStage(None, blocks, queries), down)
        load(module, GCViTLayer.rename(params))
        return module.eval()

    @staticmethod
    def run(module: nn.Sequential, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)}


@official(_REPOSITORY, "GCViT", ours=Ours)
class GCViT:
    """Images to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _ours(params, _NETWORK)

    @classmethod
    def build(cls, arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        net = Ours(
            dim=arguments.get("dim", 64),
            depths=arguments["depths"],
            heads=arguments["num_heads"],
            image=arguments.get("resolution", 224),
            windows=arguments["window_size"],
            mlp_ratio=arguments.get("mlp_ratio", 3.0),
            layer_scale=arguments.get("layer_scale"),
            bias=arguments.get("qkv_bias", True),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.2),
        )
        load(net, cls.rename(params))
        return net.eval()

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_TIMM, "GlobalContextVit")
class TimmGCViT(GCViT):
    """timm's network, images to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _ours(params, _PEER)

    @classmethod
    def build(cls, arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        image, depths = arguments.get("img_size", 224), arguments.get("depths", (3, 4, 19, 5))
        ratios = arguments.get("window_ratio", (32, 32, 16, 32))
        theirs = {
            "dim": arguments.get("embed_dim", 64),
            "depths": depths,
            "num_heads": arguments.get("num_heads", (2, 4, 8, 16)),
            "resolution": image,
            "window_size": arguments.get("window_size") or [image // ratio for ratio in ratios[: len(depths)]],
            "drop_path_rate": arguments.get("drop_path_rate", 0.0),
        }
        return super().build({**arguments, **theirs}, params)
