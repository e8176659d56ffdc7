"""gioannides/Gaussian-Adaptive-Attention (arXiv 2401.11143): its multi-head layer and its block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import load
from attnlab.nn.channel.gaussian_adaptive import GaussianAdaptive, GaussianBlock


def _heads(params: Mapping[str, Tensor], prefix: str, count: int) -> dict[str, Tensor]:
    """The parameters of heads 0 to `count` under `prefix`, stacked."""
    return {
        ours: torch.stack([params[f"{prefix}{i}.{theirs}"] for i in range(count)])
        for ours, theirs in (("offset", "mean_offsets"), ("width", "c"))
    }


def _count(params: Mapping[str, Tensor], prefix: str) -> int:
    return sum(name.startswith(prefix) and name.endswith(".c") for name in params)


@official("gioannides/Gaussian-Adaptive-Attention", "MultiHeadGaussianAdaptiveAttention", ours=GaussianAdaptive)
class MultiHead:
    """One layer: a module per head in the authors' code."""

    @staticmethod
    def rename(params: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        heads = f"{prefix}attention_heads."
        return _heads(params, heads, _count(params, heads))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> GaussianAdaptive:
        module = GaussianAdaptive(
            arguments["norm_axis"],
            heads=arguments["num_heads"],
            gaussians=arguments["num_gaussians"],
            padding=arguments.get("padding_value"),
        )
        load(module, MultiHead.rename(params))
        return module

    @staticmethod
    def run(module: GaussianAdaptive, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"]), "mixture": module.weights(inputs["x"]).detach()}


@official("gioannides/Gaussian-Adaptive-Attention", "GaussianAdaptiveAttention")
class OneHead:
    """One head, which is a layer of one: its `num_heads` is not used."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> GaussianAdaptive:
        module = GaussianAdaptive(
            arguments["norm_axis"], gaussians=arguments["num_gaussians"], padding=arguments.get("padding_value")
        )
        load(module, {"offset": params["mean_offsets"][None], "width": params["c"][None]})
        return module

    run = staticmethod(MultiHead.run)


@official("gioannides/Gaussian-Adaptive-Attention", "GaussianBlock", ours=GaussianBlock)
class Block:
    """Layers with their residuals."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for i in range(len({name.split(".")[1] for name in params})):
            prefix = f"layers.{i}."
            renamed.update({prefix + n: p for n, p in MultiHead.rename(params, prefix).items()})
        return renamed

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> GaussianBlock:
        module = GaussianBlock(
            layers=arguments["num_layers"],
            axes=arguments["norm_axes"],
            heads=arguments["num_heads"],
            gaussians=arguments["num_gaussians"],
            padding=arguments.get("padding_value"),
        )
        load(module, Block.rename(params))
        return module

    @staticmethod
    def run(module: GaussianBlock, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
