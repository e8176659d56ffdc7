"""hhb072/STViT (arXiv 2211.11167): its attention, its layer and its network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.stvit import STViT as Ours
from attnlab.models.vision.stvit import SuperTokenBlock
from attnlab.nn.tokens.super_tokens import SuperTokens

_REPOSITORY = "hhb072/STViT"

_ATTENTION: tuple[Rule, ...] = (
    (r"stoken_refine\.qkv\.", "attention.wqkv."),
    (r"stoken_refine\.proj\.", "attention.wo."),
)
_LAYER: tuple[Rule, ...] = (
    (r"(^|\.)attn\.", r"\1mixer."),
    (r"pos_embed\.conv\.", "positions."),
    (r"norm1\.norm\.", "norm1."),
    (r"mlp2\.conv\.conv\.", "mlp.conv."),
    (r"mlp2\.", "mlp."),
    (r"gamma_(\d)$", r"scale\1"),
    *_ATTENTION,
)
_NETWORK: tuple[Rule, ...] = (
    (r"^patch_embed\.proj\.(\d+)\.", lambda m: f"stem.{('conv', '', 'norm')[int(m[1]) % 3]}{int(m[1]) // 3 + 1}."),
    (r"^layers\.(\d+)\.downsample\.proj\.0\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.conv."),
    (r"^layers\.(\d+)\.downsample\.proj\.1\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.norm."),
    (r"^layers\.", "stages."),
    (r"^norm\.", "norm.norm."),
    (r"^proj\.", "norm.conv."),
    *_LAYER,
)


def _ours(params: Mapping[str, Tensor], rules: tuple[Rule, ...], heads: Mapping[str, int]) -> dict[str, Tensor]:
    """Renamed; 1×1 convolutions as matrices, and each head's q, k and v, which lie together, put with its kind.

    `heads` by the start of the name of what belongs to a stage.
    """
    found = {}
    kept = {n: t for n, t in params.items() if not re.search(r"(un)?fold\.weights$", n)}
    for name, tensor in rename(kept, rules).items():
        if re.search(r"(wqkv|wo|fc1|fc2)\.weight$", name):
            tensor = tensor.flatten(1)
        elif re.search(r"scale\d$", name):
            tensor = tensor.flatten()
        if ".wqkv." in f".{name}":
            (count,) = [h for start, h in heads.items() if name.startswith(start)]
            tensor = tensor.unflatten(0, (count, 3, -1)).transpose(0, 1).flatten(0, 2)
        found[name] = tensor
    return found


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _mixer(arguments: Mapping[str, Any], bias: bool) -> SuperTokens:
    return SuperTokens(
        arguments["dim"],
        heads=arguments.get("num_heads", 8),
        cell=_pair(arguments["stoken_size"]),
        steps=arguments.get("n_iter", 1),
        bias=bias,
    )


@official(_REPOSITORY, "StokenAttention")
class StokenAttention:
    """On maps `(B, C, H, W)`."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> SuperTokens:
        module = _mixer(arguments, "stoken_refine.qkv.bias" in params)
        load(module, _ours(params, _ATTENTION, {"": arguments.get("num_heads", 8)}))
        return module

    @staticmethod
    def run(module: SuperTokens, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "StokenAttentionLayer")
class StokenAttentionLayer:
    """On maps `(B, C, H, W)`."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> SuperTokenBlock:
        dim = arguments["dim"]
        module = SuperTokenBlock(
            dim,
            _mixer(arguments, "attn.stoken_refine.qkv.bias" in params),
            mlp_ratio=len(params["mlp2.fc1.weight"]) / dim,
            layer_scale=1e-5 if "gamma_1" in params else None,
        )
        load(module, _ours(params, _LAYER, {"": arguments.get("num_heads", 1)}))
        return module

    @staticmethod
    def run(module: SuperTokenBlock, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "STViT", ours=Ours)
class STViT:
    """Images to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor], heads: tuple[int, ...] | None = None) -> dict[str, Tensor]:
        """`heads` per stage; those of the three published sizes are known by their widths."""
        if heads is None:
            widths = {
                int(m[1]): len(t) for n, t in params.items() if (m := re.match(r"layers\.(\d)\..*norm2\.bias", n))
            }
            known = {
                (64, 128, 320, 512): (1, 2, 5, 8),
                (96, 192, 384, 512): (2, 3, 6, 8),
                (96, 192, 448, 640): (2, 3, 7, 10),
            }
            dims = tuple(widths[stage] for stage in sorted(widths))
            if dims not in known:
                raise ValueError(f"heads must be given for stages of widths {dims}: weights do not tell them")
            heads = known[dims]
        return _ours(params, _NETWORK, {f"stages.{stage}.": count for stage, count in enumerate(heads)})

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        heads = tuple(arguments.get("num_heads", (3, 6, 12, 24)))
        start = arguments.get("init_values", 1e-6)
        net = Ours(
            dims=arguments.get("embed_dim", (96, 192, 384, 768)),
            depths=arguments.get("depths", (2, 2, 6, 2)),
            heads=heads,
            cells=[_pair(size) for size in arguments.get("stoken_size", (8, 4, 2, 1))],
            steps=arguments.get("n_iter", (1,) * len(heads)),
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            bias=arguments.get("qkv_bias", True),
            layer_scale=[start if scaled else None for scaled in arguments.get("layerscale", (False,) * len(heads))],
            head_dim=len(params["proj.weight"]),
            in_channels=params["patch_embed.proj.0.weight"].shape[1],
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.0),
        )
        load(net, STViT.rename(params, heads))
        return net

    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
