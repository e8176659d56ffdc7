"""guoyongcs/TAPADL (arXiv 2303.11126): token-aware pooling, its block and networks, the diversification loss."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.fan import FAN as OurFAN
from attnlab.models.vision.rvt import RVT, PooledNorm, RobustBlock
from attnlab.nn.spatial.token_pooling import dilated_mean
from attnlab.recipes.robust_attention import diversity_loss, recorded

_REPOSITORY = "guoyongcs/TAPADL"

_ATTENTION: tuple[Rule, ...] = (
    (r"(^|\.)attn\.qkv\.", r"\1mixer.wqkv."),
    (r"(^|\.)attn\.proj\.", r"\1mixer.wo."),
)
_POOL: tuple[Rule, ...] = (
    (r"(^|\.)norm1\.", r"\1norm1.norm."),
    (r"(^|\.)dilation_predictor\.proj\.", r"\1norm1.pool.predict."),
)
_LOCAL: tuple[Rule, ...] = (
    (r"(^|\.)mlp\.(fc1|fc2|dwconv)\.", r"\1mlp.\2.conv."),
    (r"(^|\.)mlp\.bn1\.", r"\1mlp.fc1.norm."),
    (r"(^|\.)mlp\.bn2\.", r"\1mlp.dwconv.norm."),
    (r"(^|\.)mlp\.bn3\.", r"\1mlp.fc2.norm."),
)
_NETWORK: tuple[Rule, ...] = (
    (r"^norm\.", "head.0."),
    (r"^head\.(?=weight|bias)", "head.1."),
    (r"^patch_embed\.proj\.", "stem."),
    (r"^transformers\.", "stages."),
    (r"^pools\.(\d+)\.conv\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
)


def _rules(params: Mapping[str, Tensor]) -> tuple[Rule, ...]:
    """Of a block or network, with or without pooling, and with convolutions in its MLPs or without."""
    return _ATTENTION + (_POOL if _pooled(params) else ()) + (_LOCAL if _local(params) else ())


def _pooled(params: Mapping[str, Tensor]) -> bool:
    return any("dilation_predictor" in name for name in params)


def _local(params: Mapping[str, Tensor]) -> bool:
    return any("mlp.dwconv" in name for name in params)


def _plain(arguments: Mapping[str, Any]) -> None:
    if arguments.get("use_mask"):
        raise ValueError("use_mask must be False: the position-aware scaling of attention is not here")
    if arguments.get("qk_scale") is not None:
        raise ValueError(f"qk_scale must be None (head_dim^-½), got {arguments['qk_scale']}")


@official(_REPOSITORY, "Block")
class Block:
    """[tokens, maps so far] to tokens, and the maps; the grid is square."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> RobustBlock:
        _plain(arguments)
        block = RobustBlock(
            arguments["dim"],
            heads=arguments["num_heads"],
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            scales=arguments.get("num_scales", 1) if _pooled(params) else 0,
            local=_local(params),
            qkv_bias=arguments.get("qkv_bias", False),
            eps=arguments.get("eps", 1e-5),
            drop_path=arguments.get("drop_path", 0.0),
        )
        load(block, rename(params, _rules(params)))
        return block

    @staticmethod
    def run(module: RobustBlock, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens = inputs["x"]
        side = round(tokens.shape[1] ** 0.5)
        x = tokens.mT.unflatten(2, (side, side))
        with recorded(module) as maps:
            found = {"y": module(x).flatten(2).mT}
        if isinstance(module.norm1, PooledNorm):
            found["pred_scale"] = module.norm1.pool.shares(x).permute(0, 2, 3, 1)[:, None]
        return {**found, "attn": maps[0]}


@official(_REPOSITORY, "PoolingTransformer", ours=RVT)
class PoolingTransformer:
    """Images to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, _NETWORK + _rules(params))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> RVT:
        _plain(arguments)
        heads = arguments["heads"]
        if arguments.get("patch_size", 16) == 4:
            raise ValueError("patch_size must be 16, got 4")
        model = RVT(
            dims=tuple(dim * count for dim, count in zip(arguments["base_dims"], heads, strict=True)),
            depths=tuple(arguments["depth"]),
            heads=tuple(heads),
            scales=arguments.get("num_scales", 1) if _pooled(params) else 0,
            local=_local(params),
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.0),
        )
        load(model, PoolingTransformer.rename(params))
        return model

    @staticmethod
    def run(module: RVT, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "DilatedAvgPooling")
class DilatedAvgPooling:
    """Maps (B, C, H, W) to their means."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        return partial(dilated_mean, dilation=arguments.get("dilation", 0))

    @staticmethod
    def run(module: Callable[[Tensor], Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "AttentionDiversificationLoss")
class AttentionDiversificationLoss:
    """The layers' weights attn0, attn1, … to the loss."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Callable[..., Tensor]:
        return partial(diversity_loss, threshold=arguments.get("th", 2))

    @staticmethod
    def run(module: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        maps = sorted(inputs.items(), key=lambda item: int(item[0].removeprefix("attn") or 0))
        return {"loss": module([weights for _, weights in maps])}


_FAN: tuple[Rule, ...] = (
    (r"^patch_embed\.proj\.(\d)\.0\.", lambda m: f"stem.0.{int(m[1]) // 2}.conv."),
    (r"^patch_embed\.proj\.(\d)\.1\.", lambda m: f"stem.0.{int(m[1]) // 2}.norm."),
    (r"^patch_embed\.proj\.", "stem.0.out."),
    (r"^patch_embed\.backbone\.stem\.0\.", "stem.0.patches.conv."),
    (r"^patch_embed\.backbone\.stem\.1\.", "stem.0.patches.norm."),
    (r"^patch_embed\.backbone\.stages\.0\.blocks\.", "stem.0.first."),
    (r"^patch_embed\.backbone\.stages\.1\.blocks\.", "stem.0.second."),
    (r"^patch_embed\.backbone\.stages\.1\.downsample\.0\.", "stem.0.down.norm."),
    (r"^patch_embed\.backbone\.stages\.1\.downsample\.1\.", "stem.0.down.conv."),
    (r"\.conv_dw\.", ".conv."),
    (r"^(stem\..*)\.gamma$", r"\1.scale"),
    (r"^pos_embed\.token_projection\.", "stem.1.project."),
    (r"^blocks\.", "stages.0.blocks."),
    (r"^cls_attn_blocks\.", "class_blocks."),
    (r"^cls_token$", "class_token"),
    (r"\.attn\.(wqkv|wkv)\.", r".mixer.\1."),
    (r"\.attn\.q\.", ".mixer.wq."),
    (r"\.attn\.proj\.", ".mixer.wo."),
    (r"\.mlp\.mlp_v\.dwconv\.conv1\.", ".mlp.local.0."),
    (r"\.mlp\.mlp_v\.dwconv\.bn\.", ".mlp.local.2."),
    (r"\.mlp\.mlp_v\.dwconv\.conv2\.", ".mlp.local.3."),
    (r"\.mlp\.mlp_v\.gamma$", ".mlp.scale"),
    (r"\.mlp\.mlp_v\.", ".mlp."),
    (r"\.mlp\.norm_v\.", ".mlp.norm."),
    (r"\.mlp\.q\.", ".mlp.wq."),
    (r"\.gamma(\d)$", r".scale\1"),
)


_STAGES = ("first", "second")


@official(_REPOSITORY, "FAN", ours=OurFAN)
class FAN:
    """Images to logits; plain, or with pooling in every block."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = dict(params)
        for name in [n for n in given if n.startswith("blocks.") and ".attn.q." in n]:
            q, kv = given.pop(name), given.pop(name.replace(".q.", ".kv."))
            given[name.replace(".q.", ".wqkv.")] = torch.cat((q, kv))
        for name in [n for n in given if n.startswith("cls_attn_blocks.") and ".attn.k." in n]:
            k, v = given.pop(name), given.pop(name.replace(".k.", ".v."))
            given[name.replace(".k.", ".wkv.")] = torch.cat((k, v))
        for name, tensor in given.items():
            if name.endswith((".temperature", "cls_token")):
                given[name] = tensor.flatten()
            elif tensor.ndim == 4 and ("token_projection" in name or ("stages" in name and ".mlp." in name)):
                given[name] = tensor.flatten(1)
        found = rename(given, _FAN)
        if not _pooled(params):
            return found
        pool: tuple[Rule, ...] = (
            (r"^(stages\.0\.blocks\.\d+)\.norm1\.", r"\1.norm1.norm."),
            (r"^(stages\.0\.blocks\.\d+)\.dilation_predictor\.proj\.", r"\1.norm1.pool.predict."),
        )
        return rename(found, pool)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> OurFAN:
        widths = arguments.get("channel_dims") or ()
        if arguments.get("se_mlp") or arguments.get("c_head_num") or len(set(widths)) > 1:
            raise ValueError(f"se_mlp, c_head_num and channel_dims of several widths are not here, got {arguments}")
        found = FAN.rename(params)
        stem = tuple(sum(bool(re.fullmatch(rf"stem\.0\.{part}\.\d+\.scale", n)) for n in found) for part in _STAGES)
        model = OurFAN(
            dim=arguments.get("embed_dim", 768),
            depth=arguments.get("depth", 12),
            heads=arguments.get("num_heads", 12),
            scales=arguments.get("num_scales", 1) if _pooled(params) else 0,
            stem_depths=(stem[0], stem[1]) if any(stem) else None,
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            class_layers=arguments.get("cls_attn_layers", 2),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.0),
        )
        load(model, found)
        return model

    @staticmethod
    def run(module: OurFAN, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
