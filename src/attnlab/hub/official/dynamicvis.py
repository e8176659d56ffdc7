"""KyanChen/DynamicVis (arXiv 2503.16426): its blocks, its multi-instance loss, and its backbones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import mamba, official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.dynamicvis import DynamicVis
from attnlab.nn.sparse.routed_mamba import FlippedMamba, RoutedMamba
from attnlab.recipes.regions import multi_instance_loss

_REPOSITORY = "KyanChen/DynamicVis"

_BLOCK: tuple[Rule, ...] = (
    (r"(^|\.)pre_norm\.", r"\1norm."),
    (r"(^|\.)gate_layer\.0\.", r"\1gate."),
    (r"(^|\.)mamba_layer\.", r"\1mixer."),
)
_MIXER: tuple[Rule, ...] = (
    (r"(^|\.)spatial_gate\.", r"\1router."),
    (r"(^|\.)spatial_mamba_mixer\.", r"\1block."),
    *_BLOCK,
)
_NETWORK: tuple[Rule, ...] = (
    (r"^layers\.0\.0\.projection\.", "stem.0.conv."),
    (r"^layers\.0\.0\.norm\.", "stem.0.norm."),
    (r"^layers\.(\d+)\.0\.projection\.", r"stages.\1.downsample.conv."),
    (r"^layers\.(\d+)\.0\.norm\.", r"stages.\1.downsample.norm."),
    (r"^layers\.(\d+)\.1\.(\d+)\.", r"stages.\1.blocks.\2.mixer."),
    (r"^layers\.(\d+)\.2\.", r"stages.\1.norm."),
    (r"^post_meanpool_norm\.", "pooled_norm."),
    (r"^pos_embed$", "stem.1.table"),
)
_PATHS = {
    "forward": "forward", "shuffle": "shuffle", "forward_reverse_mean": "mean", "forward_reverse_gate": "gate",
    "forward_reverse_shuffle_mean": "shuffle_mean", "forward_reverse_shuffle_gate": "shuffle_gate",
}  # fmt: skip
_PLACES = {"none": "none", "head": "head", "mid": "middle", "headtail": "ends"}


def _renamed(params: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """By our names: Mamba's own parameters lie under mamba_layer, and nothing else goes through its rules."""
    inside = {n: t for n, t in params.items() if "mamba_layer." in n}
    outside = {n: t for n, t in params.items() if n not in inside}
    return rename({**outside, **mamba.layer(inside)}, rules)


def _block_options(arguments: Mapping[str, Any], params: Mapping[str, Tensor]) -> dict[str, Any]:
    if arguments.get("mamba2"):
        raise ValueError("mamba2 must be False: blocks are of Mamba here")
    of = {n.rpartition("mamba_layer.")[2]: t for n, t in params.items()}
    dim, inner = of["in_proj.weight"].shape[1], of["out_proj.weight"].shape[1]
    path = arguments.get("path_type", "forward_reverse_mean")
    return {
        "states": of["A_log"].shape[1], "expand": inner // dim, "conv": of["conv1d.weight"].shape[-1],
        "path": _PATHS[path],
    }  # fmt: skip


@official(_REPOSITORY, "MambaBlock", ours=FlippedMamba)
class MambaBlock:
    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params, _BLOCK)

    @classmethod
    def build(cls, arguments: dict[str, Any], params: dict[str, Tensor]) -> FlippedMamba:
        eps = arguments.get("layer_norm_epsilon", 1e-5)
        module = FlippedMamba(len(params["pre_norm.weight"]), eps=eps, **_block_options(arguments, params))
        load(module, cls.rename(params))
        return module.eval()

    @staticmethod
    def run(module: FlippedMamba, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "SpatialSparseMixer", ours=RoutedMamba)
class SpatialSparseMixer:
    """Its output has the residual path inside; ours has not."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params, _MIXER)

    @classmethod
    def build(cls, arguments: dict[str, Any], params: dict[str, Tensor]) -> RoutedMamba:
        means = arguments.get("global_token_cfg", {"pos": "none", "num": 1})
        noise = arguments.get("sampling_scale", {"val": 0.2})
        module = RoutedMamba(
            arguments["embed_dims"],
            ratio=arguments.get("reduction_ratio", 1),
            pooled=None if means.get("num", 1) == -1 else means.get("num", 1),
            place=_PLACES[means["pos"]],
            weigh_all=arguments.get("is_softmax_on_x", False),
            renormalize=arguments.get("norm_topk_prob", False),
            noise=0.0 if noise is None else noise["val"],
            variant="release",
            **_block_options(arguments, params),
        )
        load(module, cls.rename(params))
        return module.eval()

    @staticmethod
    def run(module: RoutedMamba, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        found = {"y": x + module(x)}
        return found if module.router is None else {**found, "selected": module.route(x)[1]}


@official(_REPOSITORY, "MILCrossEntropy")
class MILCrossEntropy:
    """The head's whole multi-instance loss; labels, scale and weight stand in the call."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> dict[str, Any]:
        call = arguments["call"]
        labels = re.search(r"labels\s*\[([\d,\s]+)\]", call)
        if labels is None:
            raise ValueError(f"call must name the labels, as in labels [0,2], got {call!r}")
        scale = re.search(r"logit scale\s+([\d.]+)(?:/([\d.]+))?", call)
        weight = re.search(r"mil_weight\s+([\d.]+)", call)
        return {
            "labels": torch.tensor([int(n) for n in labels[1].split(",")]),
            "scale": float(scale[1]) / float(scale[2] or 1) if scale else 1 / 0.07,
            "weight": float(weight[1]) if weight else 0.5,
        }

    @staticmethod
    def run(module: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": multi_instance_loss(inputs["f"], inputs["e"], **module)}


@official(_REPOSITORY, "DynamicVisBackbone", ours=DynamicVis)
class DynamicVisBackbone:
    """The backbone, alone or (under "backbone.") in a network, of which the rest is left out."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inside = {n.removeprefix("backbone."): t for n, t in params.items() if n.startswith("backbone.")}
        ours = _renamed(inside or params, (*_NETWORK, *_MIXER))
        if "stem.1.table" in ours:
            ours["stem.1.table"] = ours["stem.1.table"].flatten(0, -2)
        # Networks that use all maps have no norm behind the mean.
        last = ours[f"stages.{max(int(n[7]) for n in ours if n.startswith('stages.'))}.norm.weight"]
        ours.setdefault("pooled_norm.weight", torch.ones_like(last))
        ours.setdefault("pooled_norm.bias", torch.zeros_like(last))
        return ours

    @classmethod
    def build(cls, arguments: dict[str, Any], params: dict[str, Tensor]) -> DynamicVis:
        ours = cls.rename(params)
        stages = range(1 + max(int(n[7]) for n in ours if n.startswith("stages.")))
        blocks = [{int(n.split(".")[3]) for n in ours if n.startswith(f"stages.{i}.blocks.")} for i in stages]
        net = DynamicVis(
            dims=[len(ours[f"stages.{i}.norm.weight"]) for i in stages],
            depths=[len(found) for found in blocks],
            ratios=arguments.get("spatial_token_keep_ratios", (8, 4, 2, 1)),
            path=_PATHS[arguments.get("path_type", "forward_reverse_mean")],
            states=ours["stages.0.blocks.0.mixer.block.mixer.a_log"].shape[1],
            image=arguments.get("img_size", 512) if "stem.1.table" in ours else None,
            num_classes=0,
        )
        load(net, ours)
        return net.eval()

    @staticmethod
    def run(module: DynamicVis, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        maps = {f"y{i}": m for i, m in enumerate(module.forward_features(x))}
        return {**maps, "y": module(x)}
