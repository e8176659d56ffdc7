"""SHI-Labs/Neighborhood-Attention-Transformer: NAT (arXiv 2204.07143), DiNAT and DiNAT_s (2209.15001)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.skeletons.pyramid import Block
from attnlab.models.vision.nat import NAT as Ours
from attnlab.models.vision.nat import DiNAT
from attnlab.nn.spatial.neighborhood import NeighborhoodAttention

_REPOSITORY = "SHI-Labs/Neighborhood-Attention-Transformer"

_ATTENTION: tuple[Rule, ...] = (
    (r"(^|\.)qkv\.", r"\1wqkv."),
    (r"(^|attn\.)proj\.", r"\1wo."),
    (r"(^|\.)rpb$", r"\1table"),
)
_LAYER: tuple[Rule, ...] = (*_ATTENTION, (r"(^|\.)attn\.", r"\1mixer."), (r"(^|\.)gamma(\d)$", r"\1scale\2"))
_NETWORK: tuple[Rule, ...] = (
    (r"^patch_embed\.proj\.(\d)\.", lambda m: f"stem.conv{int(m[1]) + 1}."),
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^(levels|layers)\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[2]) + 1}.downsample."),
    (r"^(levels|layers)\.", "stages."),
    *_LAYER,
)


def _tables(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tables of relative positions `(heads, 2k−1, …)` as ours, `(Π(2k−1), heads)`."""
    return {n: t.flatten(1).t() if n.rpartition(".")[2] == "table" else t for n, t in params.items()}


def _attention(arguments: Mapping[str, Any], *, axes: int = 2, relative: bool | None = None) -> NeighborhoodAttention:
    if relative is None:
        relative = arguments.get("bias", arguments.get("rel_pos_bias", True))
    return NeighborhoodAttention(
        arguments["dim"],
        heads=arguments["num_heads"],
        axes=axes,
        kernel=arguments.get("kernel_size", 7),
        dilation=arguments.get("dilation") or 1,
        relative=relative,
        small="pad",
        bias=arguments.get("qkv_bias", True),
        out_bias=True,
        scale=arguments.get("qk_scale"),
        dropout=arguments.get("attn_drop", 0.0),
    )


@official(_REPOSITORY, "NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention")
class Attention:
    """On maps `(B, H, W, C)`, with the table of relative positions of NATTEN before 0.20."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _tables(rename(params, _ATTENTION))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> NeighborhoodAttention:
        found = re.search(r"Attention(\d)D", arguments["case_name"])
        module = _attention(arguments, axes=int(found[1]) if found else 2, relative="rpb" in params)
        load(module, Attention.rename(params))
        return module

    @staticmethod
    def run(module: NeighborhoodAttention, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        grid = tuple(inputs["x"].shape[1:-1])
        return {"y": module(inputs["x"].flatten(1, -2), grid=grid).unflatten(1, grid)}


@official(_REPOSITORY, "NATLayer", "NATransformerLayer")
class Layer:
    """One block, on maps `(B, H, W, C)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _tables(rename(params, _LAYER))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Block:
        block = Block(
            arguments["dim"],
            _attention(arguments, relative=True),
            layout="tokens",
            mlp=arguments.get("mlp_ratio", 4.0),
            layer_scale=arguments.get("layer_scale"),
            drop_path=arguments.get("drop_path", 0.0),
        )
        load(block, Layer.rename(params))
        return block

    @staticmethod
    def run(module: Block, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)}


@official(_REPOSITORY, ours=DiNAT)
@official(_REPOSITORY, "NAT", "DiNAT", "DiNAT_s", ours=Ours)
class Network:
    """Images to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # The convolutional stem's norm is its second layer's; that of patches is the only one.
        renamed = _tables(rename(params, _NETWORK))
        old = "patch_embed.norm."
        stem = "stem.norm2." if "stem.conv2.weight" in renamed else "stem.norm."
        renamed = {n.replace(old, stem): t for n, t in renamed.items()}
        return {re.sub(r"downsample\.reduction", _reduction(t), n): t for n, t in renamed.items()}

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        swin = "patch_embed.proj.weight" in params
        depths = arguments.get("depths", (2, 2, 6, 2))
        net = Ours(
            dim=arguments.get("embed_dim", 96),
            depths=depths,
            heads=arguments.get("num_heads", (3, 6, 12, 24)),
            kernel=arguments.get("kernel_size", 7),
            dilations=arguments.get("dilations"),
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            layer_scale=arguments.get("layer_scale"),
            patches=swin,
            bias=arguments.get("qkv_bias", True),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.2),
            dropout=arguments.get("drop_rate", 0.0),
        )
        load(net, Network.rename(params))
        return net

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


def _reduction(weight: Tensor) -> str:
    """A downsampling convolution is `conv` with us; Swin's projection keeps its name."""
    return "downsample.conv" if weight.dim() == 4 else "downsample.reduction"
