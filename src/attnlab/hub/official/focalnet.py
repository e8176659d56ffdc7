"""microsoft/FocalNet (arXiv 2203.11926): the modulation, its block and the network; and timm's network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.skeletons.pyramid import Block
from attnlab.models.vision.focalnet import FocalNet as Ours
from attnlab.nn.spatial.focal import FocalModulation as OurModulation

_REPOSITORY = "microsoft/FocalNet"

_MODULATION: tuple[Rule, ...] = (
    (r"(^|modulation\.)f\.", r"\1wqcg."),
    (r"focal_layers\.(\d+)\.0\.", r"convs.\1."),
    (r"(^|modulation\.)h\.", r"\1wm."),
    (r"(^|modulation\.)ln\.", r"\1norm."),
    (r"(^|modulation\.)proj\.", r"\1wo."),
)
_BLOCK: tuple[Rule, ...] = (*_MODULATION, (r"modulation\.", "mixer."), (r"gamma_(\d)$", r"scale\1"))
_NETWORK: tuple[Rule, ...] = (
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    (r"^layers\.(\d+)\.downsample\.proj\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.conv."),
    (r"^layers\.(\d+)\.downsample\.norm\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.norm."),
    (r"^layers\.", "stages."),
    *_BLOCK,
)
_TIMM: tuple[Rule, ...] = (
    (r"^stem\.proj\.", "stem.conv."),
    (r"downsample\.proj\.", "downsample.conv."),
    (r"^layers\.", "stages."),
    (r"norm(\d)_post\.", r"norm\1."),
    (r"ls(\d)\.gamma$", r"gamma_\1"),
    (r"^head\.fc\.", "head."),
    *_BLOCK,
)


def _flat(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """1×1 convolutions as the linear layers that they are."""
    return {n: t.flatten(1) if t.ndim == 4 and t.shape[2:] == (1, 1) else t for n, t in params.items()}


def _modulation(arguments: Mapping[str, Any], dim: int) -> OurModulation:
    return OurModulation(
        dim,
        levels=arguments["focal_level"],
        window=arguments["focal_window"],
        factor=arguments.get("focal_factor", 2),
        bias=arguments.get("bias", True),
        post_norm=arguments.get("use_postln_in_modulation", False),
        normalize=arguments.get("normalize_modulator", False),
        dropout=arguments.get("proj_drop", arguments.get("drop", 0.0)),
    )


@official(_REPOSITORY, "FocalModulation", ours=OurModulation)
class FocalModulation:
    """On maps `(B, H, W, C)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _flat(rename(params, _MODULATION))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> OurModulation:
        module = _modulation(arguments, arguments["dim"])
        load(module, FocalModulation.rename(params))
        return module

    @staticmethod
    def run(module: OurModulation, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)}


@official(_REPOSITORY, "FocalNetBlock")
class FocalNetBlock:
    """On tokens `(B, H·W, C)`, whose grid is the argument `input_resolution`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _flat(rename(params, _BLOCK))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> tuple[Block, tuple[int, int]]:
        dim = arguments["dim"]
        block = Block(
            dim,
            _modulation({"focal_level": 1, "focal_window": 3, **arguments}, dim),
            mlp=arguments.get("mlp_ratio", 4.0),
            post_norm=arguments.get("use_postln", False),
            layer_scale=arguments.get("layerscale_value", 1e-4) if arguments.get("use_layerscale") else None,
        )
        load(block, FocalNetBlock.rename(params))
        height, width = arguments["input_resolution"]
        return block.eval(), (height, width)

    @staticmethod
    def run(module: tuple[Block, tuple[int, int]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        block, grid = module
        x = inputs["x"].unflatten(1, grid).permute(0, 3, 1, 2)
        return {"y": block(x).permute(0, 2, 3, 1).flatten(1, 2)}


@official(_REPOSITORY, "FocalNet", ours=Ours)
class FocalNet:
    """Images to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _flat(rename(params, _NETWORK))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        stages = len(arguments.get("depths", (2, 2, 6, 2)))
        net = Ours(
            dim=arguments.get("embed_dim", 96),
            depths=arguments.get("depths", (2, 2, 6, 2)),
            levels=arguments.get("focal_levels", (2, 2, 2, 2))[:stages],
            window=arguments.get("focal_windows", (3, 3, 3, 3))[:stages],
            patch=4 if arguments.get("use_conv_embed") else arguments.get("patch_size", 4),
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            overlap=arguments.get("use_conv_embed", False),
            post_norm=arguments.get("use_postln", False),
            layer_scale=arguments.get("layerscale_value", 1e-4) if arguments.get("use_layerscale") else None,
            post_norm_inside=arguments.get("use_postln_in_modulation", False),
            normalize=arguments.get("normalize_modulator", False),
            patch_norm=arguments.get("patch_norm", True),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.1),
        )
        load(net, FocalNet.rename(params))
        return net

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official("huggingface/pytorch-image-models", "FocalNet")
class TimmFocalNet:
    """Images to logits; the same network with other names and its linear layers as 1×1 convolutions."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _flat(rename(params, _TIMM))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        net = Ours(
            dim=arguments.get("embed_dim", 96),
            depths=arguments.get("depths", (2, 2, 6, 2)),
            levels=arguments.get("focal_levels", (2, 2, 2, 2)),
            window=arguments.get("focal_windows", (3, 3, 3, 3)),
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            overlap=arguments.get("use_overlap_down", False),
            post_norm=arguments.get("use_post_norm", False),
            layer_scale=arguments.get("layerscale_value"),
            post_norm_inside=arguments.get("use_post_norm_in_modulation", False),
            normalize=arguments.get("normalize_modulator", False),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.1),
        )
        load(net, TimmFocalNet.rename(params))
        return net

    run = FocalNet.run
