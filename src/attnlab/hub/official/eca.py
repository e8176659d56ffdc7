"""BangguWu/ECANet (arXiv 1910.03151): the layer and its ablation, the residual blocks and the networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.ecamobilenet import DEPTHS, ECAMobileNetV2, InvertedResidual
from attnlab.models.vision.ecaresnet import ECAResNet, ResidualBlock
from attnlab.nn.channel.eca import EfficientChannelAttention

_REPOSITORY = "BangguWu/ECANet"

_BLOCK: tuple[Rule, ...] = (
    (r"(^|\.)conv(\d)\.weight$", lambda m: f"{m[1]}convs.{int(m[2]) - 1}.conv.weight"),
    (r"(^|\.)bn(\d)\.", lambda m: f"{m[1]}convs.{int(m[2]) - 1}.norm."),
    (r"(^|\.)eca\.conv\.", r"\1gate."),
    (r"(^|\.)downsample\.0\.", r"\1shortcut.conv."),
    (r"(^|\.)downsample\.1\.", r"\1shortcut.norm."),
)
_RESNET: tuple[Rule, ...] = (
    (r"^conv1\.", "stem.conv."),
    (r"^bn1\.", "stem.norm."),
    (r"^layer(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
    (r"^fc\.", "head."),
    *_BLOCK,
)


def _inverted(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names within inverted residuals: the projection and its batch norm have no folder of their own there."""
    renamed = {}
    for name, tensor in params.items():
        head, found, rest = name.rpartition("conv.") if ".conv.weight" not in name else (name, "", "")
        parts = rest.split(".")
        if found and len(parts) == 2:  # "2.weight", "3.running_mean"
            index, part = int(parts[0]), "conv" if tensor.ndim == 4 else "norm"
            name = f"{head}convs.{index - (part == 'norm')}.{part}.{parts[1]}"
        renamed[name] = tensor
    return rename(
        renamed,
        (
            (r"(^|\.)conv\.\d\.conv\.weight$", r"\1gate.weight"),
            (r"(^|\.)conv\.(\d)\.0\.", r"\1convs.\2.conv."),
            (r"(^|\.)conv\.(\d)\.1\.", r"\1convs.\2.norm."),
        ),
    )


class _Maps:
    """Runs on one map or image `x`."""

    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "eca_layer", ours=EfficientChannelAttention)
class Layer(_Maps):
    """Both layers; the ablation's kernel has one row per channel."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, ((r"^conv\.", ""),))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> EfficientChannelAttention:
        rows, _, kernel = params["conv.weight"].shape
        separate = rows > 1 or "eca_ns" in arguments["case_name"]
        module = EfficientChannelAttention(arguments["channel"], kernel=kernel, shared=not separate)
        load(module, Layer.rename(params))
        return module


@official(_REPOSITORY, "ECABasicBlock", "ECABottleneck", ours=ResidualBlock)
class Residual(_Maps):
    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, _BLOCK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> ResidualBlock:
        bottleneck = "conv3.weight" in params
        block = ResidualBlock(
            arguments["inplanes"],
            arguments["planes"] * (4 if bottleneck else 1),
            stride=arguments.get("stride", 1),
            kernel=params["eca.conv.weight"].shape[-1],
            bottleneck=bottleneck,
            project="downsample.0.weight" in params,
        )
        load(block, Residual.rename(params))
        return block


@official(
    _REPOSITORY,
    "ResNet",
    "eca_resnet18",
    "eca_resnet34",
    "eca_resnet50",
    "eca_resnet101",
    "eca_resnet152",
    ours=ECAResNet,
)
class ResNet(_Maps):
    """Depths, kernels, width and classes are read off the parameters."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, _RESNET)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> ECAResNet:
        stages = [1 + max(int(n.split(".")[1]) for n in params if n.startswith(f"layer{i}.")) for i in range(1, 5)]
        net = ECAResNet(
            depths=stages,
            kernels=[params[f"layer{i}.0.eca.conv.weight"].shape[-1] for i in range(1, 5)],
            bottleneck="layer1.0.conv3.weight" in params,
            dim=params["conv1.weight"].shape[0],
            in_channels=params["conv1.weight"].shape[1],
            num_classes=params["fc.weight"].shape[0],
        )
        load(net, ResNet.rename(params))
        return net


@official(_REPOSITORY, "InvertedResidual", ours=InvertedResidual)
class Inverted(_Maps):
    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _inverted(params)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> InvertedResidual:
        renamed = Inverted.rename(params)
        block = InvertedResidual(
            arguments["inp"],
            arguments["oup"],
            stride=arguments["stride"],
            expansion=arguments["expand_ratio"],
            kernel=renamed["gate.weight"].shape[-1],
        )
        load(block, renamed)
        return block


@official(_REPOSITORY, "ECA_MobileNetV2", "eca_mobilenet_v2", ours=ECAMobileNetV2)
class MobileNetV2(_Maps):
    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        places = iter([(stage, index) for stage, depth in enumerate(DEPTHS) for index in range(depth)])
        rules = [(rf"^features\.{i}\.", f"stages.{s}.blocks.{j}.") for i, (s, j) in enumerate(places, start=1)]
        last = len(rules) + 1
        ends = [
            (r"^features\.0\.0\.", "stem.conv."),
            (r"^features\.0\.1\.", "stem.norm."),
            (rf"^features\.{last}\.0\.", "norm.conv."),
            (rf"^features\.{last}\.1\.", "norm.norm."),
            (r"^classifier\.1\.", "head."),
        ]
        return _inverted(rename(params, [*ends, *rules]))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> ECAMobileNetV2:
        net = ECAMobileNetV2(width=arguments.get("width_mult", 1.0), num_classes=params["classifier.1.weight"].shape[0])
        load(net, MobileNetV2.rename(params))
        return net
