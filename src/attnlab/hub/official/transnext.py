"""DaiShiResearch/TransNeXt (arXiv 2311.17132): its two attentions, its channel mixer, and the network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.skeletons.convglu import ConvGLU
from attnlab.models.vision.transnext import TransNeXt as Ours
from attnlab.nn.spatial.aggregated import AggregatedAttention, CosineAttention

_REPOSITORY = "DaiShiResearch/TransNeXt"

PLACES: tuple[Rule, ...] = (
    (r"(^|\.)qkv\.", r"\1wqkv."),
    (r"(^|\.)proj\.", r"\1wo."),
    (r"(^|\.)sr\.", r"\1reduce."),
    (r"learnable_tokens$", "window_tokens"),
    (r"learnable_bias$", "window_shift"),
    (r"relative_pos_bias_local$", "window_bias"),
)
_GLU: tuple[Rule, ...] = ((r"dwconv\.dwconv\.", "conv."),)
# Buffers that the authors' modules compute from the image's size.
_COMPUTED = ("seq_length_scale", "padding_mask", "relative_pos_index", "relative_coords_table")


def fused(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """q and kv as one matrix, 1×1 convolutions as linear layers; without what is computed from the image's size."""
    params = {n: p for n, p in params.items() if not n.rpartition(".")[2].startswith(_COMPUTED)}
    for name in [n for n in params if n in ("q.weight", "q.bias") or n.endswith((".q.weight", ".q.bias"))]:
        prefix, end = name[: name.rindex("q.")], name.rpartition(".")[2]
        params[f"{prefix}qkv.{end}"] = torch.cat((params.pop(name), params.pop(f"{prefix}kv.{end}")))
    return {n: p.flatten(1) if n.endswith("sr.weight") else p for n, p in params.items()}


class OnGrid(nn.Module):
    """The attention on the grid that the authors' constructor was given, with places as their models hand them over."""

    def __init__(self, attention: CosineAttention, grid: Sequence[int]) -> None:
        super().__init__()
        self.attention, self.grid = attention, tuple(grid)

    def forward(self, x: Tensor, index: Tensor, table: Tensor) -> Tensor:
        return self.attention(x, grid=self.grid, places=(index.flatten(), table))


def attention_options(arguments: Mapping[str, Any], params: Mapping[str, Tensor]) -> dict[str, Any]:
    return dict(
        heads=len(params["temperature"]),
        bias="qkv.bias" in params or "q.bias" in params,
        dropout=arguments.get("attn_drop", 0.0),
    )


def window_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return dict(
        window=arguments.get("window_size", 3),
        ratio=arguments.get("sr_ratio", 1),
        pool=arguments.get("fixed_pool_size"),
    )


@official(_REPOSITORY, "Attention")
class Attention:
    """The last stage's. The places are given with each call."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(fused(params), PLACES)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> OnGrid:
        module = CosineAttention(len(params["proj.bias"]), **attention_options(arguments, params))
        load(module, Attention.rename(params))
        return OnGrid(module, arguments["input_resolution"])

    @staticmethod
    def run(module: OnGrid, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"], inputs["relative_pos_index"], inputs["relative_coords_table"])}


@official(_REPOSITORY, "AggregatedAttention")
class Aggregated:
    """That of the first stages."""

    rename = staticmethod(Attention.rename)
    run = staticmethod(Attention.run)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> OnGrid:
        options = {**attention_options(arguments, params), **window_options(arguments)}
        module = AggregatedAttention(len(params["proj.bias"]), **options)
        load(module, Aggregated.rename(params))
        return OnGrid(module, arguments["input_resolution"])


@official(_REPOSITORY, "ConvolutionalGLU", ours=ConvGLU)
class ConvolutionalGLU:
    """On tokens `(B, H·W, C)`; H and W are given in the call."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, _GLU)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> tuple[ConvGLU, tuple[int, int]]:
        height, width = (int(re.findall(rf"\b{side}=(\d+)", arguments["call"])[0]) for side in "HW")
        dim = arguments["in_features"]
        module = ConvGLU(dim, (arguments.get("hidden_features") or dim) * 2 // 3)
        load(module, ConvolutionalGLU.rename(params))
        return module, (height, width)

    @staticmethod
    def run(module: tuple[ConvGLU, tuple[int, int]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        glu, grid = module
        return {"y": glu(inputs["x"].unflatten(1, grid)).flatten(1, 2)}


NETWORK: tuple[Rule, ...] = (
    (r"^patch_embed1\.proj\.", "stem.conv."),
    (r"^patch_embed1\.norm\.", "stem.norm."),
    (r"^patch_embed(\d)\.proj\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.conv."),
    (r"^patch_embed(\d)\.norm\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.norm."),
    (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
    (r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
    *PLACES,
    (r"\.attn\.", ".mixer."),
    *_GLU,
)


def network_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor's arguments from the authors', with their defaults."""
    ratios = arguments.get("sr_ratios", (8, 4, 2, 1))
    windows = {w for w, r in zip(arguments.get("window_size", (3, 3, 3, None)), ratios, strict=True) if r != 1}
    if len(windows) > 1:
        raise ValueError(f"window_size must be the same in all stages, got {sorted(windows)}")
    return dict(
        dims=arguments.get("embed_dims", (64, 128, 256, 512)),
        depths=arguments.get("depths", (3, 4, 6, 3)),
        heads=arguments.get("num_heads", (1, 2, 4, 8)),
        mlp_ratios=arguments.get("mlp_ratios", (4, 4, 4, 4)),
        ratios=ratios,
        window=windows.pop() if windows else 3,
        pool=arguments.get("fixed_pool_size"),
        image=arguments.get("pretrain_size") or arguments.get("img_size", 224),
        patch=arguments.get("patch_size", 16),
        qkv_bias=arguments.get("qkv_bias", False),
        # Their constructor's norms have PyTorch's epsilon; their named sizes give another.
        eps=arguments.get("eps", 1e-5),
        in_channels=arguments.get("in_chans", 3),
        num_classes=arguments.get("num_classes", 1000),
        drop_path=arguments.get("drop_path_rate", 0.0),
        dropout=arguments.get("attn_drop_rate", 0.0),
    )


@official(_REPOSITORY, "TransNeXt", ours=Ours)
class TransNeXt:
    """Images to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(fused(params), NETWORK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        net = Ours(**network_options(arguments))
        load(net, TransNeXt.rename(params))
        return net

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
