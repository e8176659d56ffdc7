"""ZK-Zhou/spikformer (the first version; arXiv 2401.02020 has attention, MLP and blocks in common with it)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.spikformer import POOLED, SpikformerBlock, SpikingMLP, SpikingStem
from attnlab.models.vision.spikformer import Spikformer as Ours
from attnlab.nn.spiking.attention import SpikingSelfAttention
from attnlab.nn.spiking.lif import LIF

_REPOSITORY = "ZK-Zhou/spikformer"

_RULES: tuple[Rule, ...] = (
    (r"^patch_embed\.", "stem."),
    (r"(^|\.)rpe_conv\.", r"\1rpe.conv."),
    (r"(^|\.)rpe_bn\.", r"\1rpe.norm."),
    (r"^(stem\.|)proj_conv(\d?)\.", lambda m: f"{m[1]}stages.{m[2] or 0}.0.conv."),
    (r"^(stem\.|)proj_bn(\d?)\.", lambda m: f"{m[1]}stages.{m[2] or 0}.0.norm."),
    (r"^block\.", "blocks."),
    (r"(^|\.)attn\.", r"\1mixer."),
    (r"(^|\.)fc(\d)_conv\.", r"\1fc\2."),
    (r"(^|\.)fc(\d)_bn\.", r"\1norm\2."),
)
_ATTENTION: tuple[Rule, ...] = (
    (r"(^|\.)proj_conv\.", r"\1wo."),
    (r"(^|\.)proj_bn\.", r"\1norm_o."),
    (r"(^|\.)q_conv\.", r"\1wqkv."),
    (r"(^|\.)q_bn\.", r"\1norm."),
)


def _renamed(params: Mapping[str, Tensor], rules: tuple[Rule, ...] = _RULES) -> dict[str, Tensor]:
    """q, k and v in one product; 1×1 convolutions as the linear layers that they are; no norms that nothing calls."""
    joined = {}
    for name, tensor in params.items():
        if re.search(r"(^|\.)norm[12]\.", name) or re.search(r"(^|\.)[kv]_(conv|bn)\.", name):
            continue
        if re.search(r"(^|\.)q_(conv|bn)\.", name) and tensor.ndim:
            tensor = torch.cat([params[re.sub(r"q_(conv|bn)\.", rf"{w}_\1.", name)] for w in "qkv"])
        joined[name] = tensor
    attention = {n: t for n, t in joined.items() if "attn." in n or rules is _ATTENTION}
    rest = {n: t for n, t in joined.items() if n not in attention}
    found = rename({**rename(attention, _ATTENTION), **rest}, _RULES)
    return {n: t.flatten(1) if t.ndim > 2 and ".conv." not in f".{n}" else t for n, t in found.items()}


class _Module:
    """On spikes `(T, B, C, H, W)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params)

    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        return {"y": module(x.flatten(3).transpose(2, 3)).transpose(2, 3).reshape(x.shape)}


@official(_REPOSITORY, "MultiStepLIFNode")
class MultiStepLIFNode:
    """Time first. Its settings are arguments, or stand behind its name."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> LIF:
        written = {n: float(v) for n, v in re.findall(r"(\w+)\s*=\s*([\d.]+)", arguments["case_name"])}
        given = {**written, **arguments}
        return LIF(tau=given.get("tau", 2.0), threshold=given.get("v_threshold", 1.0))

    @staticmethod
    def run(module: LIF, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "SSA", ours=SpikingSelfAttention)
class SSA(_Module):
    """Beside its output, the spikes of its values `(T, B, H, N, C/H)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params, _ATTENTION)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> SpikingSelfAttention:
        module = SpikingSelfAttention(arguments["dim"], heads=arguments.get("num_heads", 8))
        load(module, SSA.rename(params))
        return module.eval()

    @staticmethod
    def run(module: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        values = module.project(x.flatten(3).transpose(2, 3))[2]
        return {**_Module.run(module, inputs), "v": values.unflatten(0, x.shape[:2])}


@official(_REPOSITORY, "MLP")
class MLP(_Module):
    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> SpikingMLP:
        dim = arguments["in_features"]
        if arguments.get("out_features") not in (None, dim):
            raise ValueError(f"out_features must be in_features = {dim}, got {arguments['out_features']}")
        module = SpikingMLP(dim, arguments.get("hidden_features") or dim)
        load(module, MLP.rename(params))
        return module.eval()


@official(_REPOSITORY, "Block")
class Block(_Module):
    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> SpikformerBlock:
        block = SpikformerBlock(
            arguments["dim"], heads=arguments["num_heads"], mlp_ratio=arguments.get("mlp_ratio", 4.0)
        )
        load(block, Block.rename(params))
        return block.eval()


@official(_REPOSITORY, "SPS")
class SPS(_Module):
    """The stem that pools, on frames."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> SpikingStem:
        stem = SpikingStem(arguments.get("in_channels", 2), arguments.get("embed_dims", 256), **POOLED)
        load(stem, SPS.rename(params))
        return stem.eval()

    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "Spikformer", "spikformer", ours=Ours)
class Spikformer(_Module):
    """Images, shown four times, to logits."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        dim, hidden = len(params["patch_embed.rpe_conv.weight"]), len(params["block.0.mlp.fc1_conv.weight"])
        net = Ours(
            dim=dim,
            depth=1 + max(int(n.split(".")[1]) for n in params if n.startswith("block.")),
            heads=arguments.get("num_heads", 8),
            mlp_ratio=hidden / dim,
            stem=POOLED,
            in_channels=params["patch_embed.proj_conv.weight"].shape[1],
            num_classes=len(params["head.weight"]) if "head.weight" in params else 0,
        )
        load(net, Spikformer.rename(params))
        return net.eval()

    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
