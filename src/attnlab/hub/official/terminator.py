"""hyperevolnet/Terminator (arXiv 2401.17948): slow nets, gates, layer, block, network, slow losses and optimiser."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.terminator import GroupStandardize, SlowFastBlock
from attnlab.models.vision.terminator import Terminator as Ours
from attnlab.nn.spatial.hyperzzw import RecursiveGate, SlowFast
from attnlab.nn.spatial.slow_net import LocalSlowNet, SlowNet
from attnlab.recipes.terminator import Kar3 as OurKar3
from attnlab.recipes.terminator import slow_loss

# The authors' own, now empty, and a fork that keeps its history.
_REPOSITORIES = ("hyperevolnet/Terminator", "lalalune/Terminator")

_SLOW: tuple[Rule, ...] = (
    (r"filters\.(\d+)\.linear\.", r"filters.\1."),
    (r"output_linear\.", "out."),
    (r"bias_pk?$", "bias"),
    (r"fast_reduce\.", "reduce."),
    (r"fast_fc1\.", "fc."),
    (r"fast_linears_x\.", "context."),
)
_GATE: tuple[Rule, ...] = ((r"(fast_)?bias_p$", "bias"), (r"fast_linear_", "w"))
_LAYER: tuple[Rule, ...] = (
    (r"Fast_Kernel_rgu_2\.", "rgu2."),
    (r"Fast_Kernel_rgu\.", "rgu1."),
    (r"(rgu\d\.)(fast_)?bias_p$", r"\1bias"),
    (r"(rgu\d\.)fast_linear_", r"\1w"),
    (r"hyper_interact\.slow_net_gc(_hi)?\.Kernel\.", "interaction.slow."),
    (r"hyper_interact\.slow_net_gs(_hi)?\.Kernel\.", "interaction.places."),
    (r"channel_mixer_hci\.slow_net_gc\.Kernel\.", "channel.slow."),
    (r"slow_net_g\.Kernel\.", "slow."),
    (r"slow_net_l(\d)\.Kernel\.", lambda m: f"branches.{int(m[1]) - 1}.slow."),
    (r"local_interact_conv_(\d)\.channel_mixer\.", lambda m: f"branches.{int(m[1]) - 1}.mixer."),
    (r"bias(\d)$", lambda m: f"branches.{int(m[1]) - 1}.bias"),
    (r"channel_mixer_mlp\.", "mlp."),
    (r"bottleneck_layer\.", "bottleneck."),
    *_SLOW,
)
_NETWORK: tuple[Rule, ...] = ((r"fast_multi_branch\.", "layer."), (r"^out_layer\.", "head."), *_LAYER)
_BUFFERS = re.compile(r"(train_length|kernel_coords|initialized)$")
_SLOW_NET = re.compile(r"(^|\.)(filters|linears|out|reduce|fc|context)(\.\d+)?\.weight$")


def _ours(params: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """Our names; slow nets' convolutions of kernel 1 as linear layers, numbers per place as a column."""
    ours = rename({n: t for n, t in params.items() if not _BUFFERS.search(n)}, rules)
    for name, tensor in ours.items():
        if _SLOW_NET.search(name):
            ours[name] = tensor.flatten(1)
        elif tensor.ndim > 2 and re.search(r"rgu\d\.bias$", name):
            ours[name] = tensor[0, 0]
        elif tensor.ndim > 2 and name.endswith("bias"):
            ours[name] = tensor.reshape(-1, 1)
    return ours


def _shape(params: Mapping[str, Tensor], prefix: str) -> tuple[int, int]:
    """Hidden width and layers of the slow net whose parameters begin so."""
    layers = {n for n in params if re.match(re.escape(prefix) + r"(.*\.)?linears\.\d+\.weight$", n)}
    return params[f"{prefix}filters.0.weight"].shape[0], len(layers)


def _layer_arguments(ours: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """What builds a `SlowFast` layer, read from its renamed parameters."""
    out, dim = ours[f"{prefix}bottleneck.weight"].shape[0], ours[f"{prefix}mlp.weight"].shape[0]
    channel, layers = _shape(ours, f"{prefix}interaction.slow.")
    return {
        "dim": dim,
        "size": ours[f"{prefix}rgu1.bias"].shape[0],
        "factor": out // dim,
        "before": ours[f"{prefix}bottleneck.weight"].shape[1] // dim - 10,
        "kernels": [round(ours[f"{prefix}branches.{i}.slow.bias"].numel() ** 0.5) for i in range(4)],
        "slow": _shape(ours, f"{prefix}slow."),
        "local": _shape(ours, f"{prefix}branches.0.slow."),
        "channel": _shape(ours, f"{prefix}channel.slow."),
        "interaction": (channel, _shape(ours, f"{prefix}interaction.places.")[0], layers),
        "running": False,
    }


def _adapter(*names: str, ours: type | None = None) -> Callable[[type], type]:
    """For the class of both repositories."""

    def add(adapter: type) -> type:
        for repository in _REPOSITORIES:
            official(repository, *names, ours=ours)(adapter)
        return adapter

    return add


class _Map:
    """On maps `(B, C, H, W)`."""

    rules: tuple[Rule, ...] = ()

    @classmethod
    def rename(cls, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _ours(params, cls.rules)

    @staticmethod
    def run(module: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@_adapter("MAGNet_G", "MAGNet_GC", ours=SlowNet)
class MAGNet(_Map):
    """A kernel from coordinates `(1, axes, *size)`."""

    rules = _SLOW

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> SlowNet:
        size = (arguments["kernel_size"],) * arguments["data_dim"]
        hidden, layers = arguments["hidden_channels"], arguments["num_layers"]
        net = SlowNet(size, arguments["out_channels"], hidden=hidden, layers=layers)
        load(net, MAGNet.rename(params))
        return net

    @staticmethod
    def run(module: SlowNet, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["coords"][0].flatten(1).mT)[None]}


@_adapter("MAGNet_L", ours=LocalSlowNet)
class MAGNetL(_Map):
    """A kernel from coordinates `(1, axes, K, K)` and maps, `(1, C, K, K)`."""

    rules = _SLOW

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> LocalSlowNet:
        net = LocalSlowNet(
            arguments["kernel_size"],
            arguments["out_channels"],
            hidden=arguments["hidden_channels"],
            layers=arguments["num_layers"],
            running=False,
        )
        load(net, MAGNetL.rename(params))
        return net.eval()

    @staticmethod
    def run(module: LocalSlowNet, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"], inputs["coords"][0].flatten(1).mT).transpose(0, 1)}


@_adapter("RGU", ours=RecursiveGate)
class RGU(_Map):
    rules = _GATE

    @classmethod
    def rename(cls, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: t[0, 0] if n == "bias" and t.ndim > 2 else t for n, t in rename(params, _GATE).items()}

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> RecursiveGate:
        module = RecursiveGate(arguments["in_channels"], arguments["bias_size"])
        load(module, RGU.rename(params))
        return module


@_adapter("G_IBS")
class GIBS(_Map):
    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> GroupStandardize:
        return GroupStandardize(arguments["channels"], groups=arguments["group_num"], running=False).eval()


@_adapter("FastMultiBranchLayer", ours=SlowFast)
class FastMultiBranchLayer(_Map):
    """Maps and up to two earlier ones to a map, and the slow kernel."""

    rules = _LAYER

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> SlowFast:
        ours = FastMultiBranchLayer.rename(params)
        layer = SlowFast(**_layer_arguments(ours))
        load(layer, ours)
        return layer.eval()

    @staticmethod
    def run(module: SlowFast, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        earlier = [inputs[name] for name in ("x_pre", "x_pre_pre") if name in inputs]
        return {"y0": module(inputs["x"], *earlier), "y1": module.slow()[None]}


@_adapter("SFNEBlock")
class SFNEBlock(_Map):
    """As the layer, with its norm and activation."""

    rules = _NETWORK

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> SlowFastBlock:
        ours = SFNEBlock.rename(params)
        block = SlowFastBlock(SlowFast(**_layer_arguments(ours, "layer.")), running=False)
        load(block, ours)
        return block.eval()

    @staticmethod
    def run(module: SlowFastBlock, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        earlier = [inputs[name] for name in ("x_pre", "x_pre_pre") if name in inputs]
        return {"y": module(inputs["x"], *earlier), "slow_kernel": module.layer.slow()[None]}


@_adapter("Terminator_image", ours=Ours)
class TerminatorImage(_Map):
    """Images to logits; its checkpoints go with `evaluation="batch"`."""

    rules = _NETWORK

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        ours = TerminatorImage.rename(params)
        blocks = [_layer_arguments(ours, f"blocks.{i}.layer.") for i in range(5)]
        net = Ours(
            image=blocks[0]["size"],
            factors=[block["factor"] for block in blocks],
            slow=[block["slow"][0] for block in blocks],
            slow_layers=[block["slow"][1] for block in blocks],
            local=blocks[0]["local"][0],
            channel=blocks[0]["channel"][0],
            interaction=blocks[0]["interaction"][:2],
            kernels=blocks[0]["kernels"],
            dropout=arguments.get("dropout", (0.0, 0.05, 0.05, 0.05, 0.05)),
            evaluation="batch",
            in_channels=blocks[0]["dim"],
            num_classes=ours["head.weight"].shape[0],
        )
        load(net, ours)
        return net.eval()

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        kernels, maps = module.slow_kernels(), module.forward_features(inputs["x"])
        outputs = {"logits": module.head(maps[-1].mean((2, 3)))}
        outputs |= {f"block{i}_mean": y.mean((2, 3)) for i, y in enumerate(maps)}
        outputs |= {f"slow_kernel{i}": kernel[None] for i, kernel in enumerate(kernels)}
        outputs["slow_loss_tiled"] = slow_loss(kernels, module.factors).reshape(1)
        outputs["slow_loss_channel_sum"] = slow_loss(kernels, module.factors, form="channel_sum").reshape(1)
        return outputs


@_adapter("cal_slow_loss")
class SlowLoss:
    """Kernels `ghk0`, `ghk1`, … `(1, C, H, W)` to the loss."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Callable[[list[Tensor]], Tensor]:
        return lambda kernels: slow_loss(kernels, arguments["factors"])

    @staticmethod
    def run(module: Callable[[list[Tensor]], Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": module([inputs[name] for name in sorted(inputs, key=lambda n: int(n[3:]))])}


@_adapter("Kar3")
class Kar3:
    """A parameter and its gradients, step by step, to where it is after each step."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Callable[[nn.Parameter], OurKar3]:
        return lambda p: OurKar3([p], arguments["lr"], betas=tuple(arguments["betas"]))

    @staticmethod
    def run(module: Callable[[nn.Parameter], OurKar3], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        p = nn.Parameter(inputs["p0"].detach().clone())
        optimiser, outputs = module(p), {}
        for step in range(sum(name.startswith("grad") for name in inputs)):
            p.grad = inputs[f"grad{step}"].detach()
            optimiser.step()
            outputs[f"p{step + 1}"] = torch.clone(p.detach())
        return outputs
