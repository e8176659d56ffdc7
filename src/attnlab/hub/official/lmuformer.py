"""zeyuliu1037/LMUFormer (arXiv 2402.04882): memory cells, embedding, feed-forward and networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.audio.lmuformer import Embedding, FeedForward
from attnlab.models.audio.lmuformer import LMUFormer as Ours
from attnlab.nn.linear.lmu import LMU
from attnlab.nn.spiking.lmu import SpikingLMU

_REPOSITORY = "zeyuliu1037/LMUFormer"

_CELL: tuple[Rule, ...] = (
    (r"(^|\.)W_([uh])\.", r"\1w\2."),
    (r"(^|\.)bn_([umh])\.", r"\1norm_\2."),
)
_EMBEDDING: tuple[Rule, ...] = (
    (r"(^|\.)conv_layers\.(\d)\.0\.", r"\1convs.\2."),
    (r"(^|\.)conv_layers\.(\d)\.3\.", r"\1norms.\2."),
    (r"(^|\.)proj_conv(\d?)\.", lambda m: f"{m[1]}convs.{m[2] or 0}."),
    (r"(^|\.)proj_bn(\d?)\.", lambda m: f"{m[1]}norms.{m[2] or 0}."),
    (r"(^|\.)rpe_conv\.", r"\1rpe."),
    (r"(^|\.)rpe_bn\.", r"\1rpe_norm."),
)
_MLP: tuple[Rule, ...] = ((r"(^|\.)fc(\d)_conv\.", r"\1fc\2."), (r"(^|\.)fc(\d)_bn\.", r"\1norm\2."))
_NETWORK: tuple[Rule, ...] = (
    (r"^block\.(\d+)\.attn\.lmu\.", r"blocks.\1.mixer."),
    (r"^block\.(\d+)\.attn\.proj_conv\.", r"blocks.\1.proj."),
    (r"^block\.(\d+)\.attn\.proj_bn\.", r"blocks.\1.norm."),
    (r"^block\.(\d+)\.attn\.prev_bn\.", r"blocks.\1.first_norm."),
    (r"^block\.", "blocks."),
    (r"^patch_embed\.", "embed."),
    (r"^head_bn\.", "norm."),
    *_CELL, *_EMBEDDING, *_MLP,
)  # fmt: skip


def _renamed(params: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """Ours without the memory's matrices, which are computed; convolutions as the products that they are."""
    fixed = ("A", "B", "H", "fft_H")
    kept = {n: t for n, t in params.items() if n.rsplit(".", 1)[-1] not in fixed}
    return {n: t.transpose(1, 2).flatten(1) if t.ndim == 3 else t for n, t in rename(kept, rules).items()}


class _Cell:
    """On tokens `(B, N, C)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params, _CELL)

    @staticmethod
    def filled(module: nn.Module, params: Mapping[str, Tensor]) -> Any:
        load(module, _Cell.rename(params))
        return module.eval()


def _sizes(arguments: dict[str, Any]) -> dict[str, Any]:
    window = arguments["theta"]
    return {"memory": arguments["memory_size"], "window": window, "out_dim": arguments["hidden_size"]}


@official(_REPOSITORY, "LMUFFTCell", ours=LMU)
class LMUFFTCell(_Cell):
    """All steps at once, and one by one."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> LMU:
        return _Cell.filled(LMU(arguments["input_size"], **_sizes(arguments)), params)

    @staticmethod
    def run(module: LMU, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        h, state, steps = module(x), module.initial_state(len(x)), []
        for piece in x.split(1, 1):
            y, state = module(piece, state=state)
            steps.append(y)
        return {"h": h, "y": h, "h_n": h[:, -1], "h_recurrent": torch.cat(steps, 1), "m_last": state.memory}


@official(_REPOSITORY, "SpikingLMUFFTCell", ours=SpikingLMU)
class SpikingLMUFFTCell(_Cell):
    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> SpikingLMU:
        return _Cell.filled(SpikingLMU(arguments["input_size"], **_sizes(arguments)), params)

    @staticmethod
    def run(module: SpikingLMU, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        h = module(inputs["x"])
        return {"y": h, "h": h, "h_n": h[:, -1:].mT}


class _Embedding:
    """Sound `(B, 1, N, mels)` to `(B, C, N)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params, _EMBEDDING)

    @staticmethod
    def run(module: Embedding, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"].squeeze(1)).mT}


def _embedding(arguments: dict[str, Any], params: dict[str, Tensor], spiking: Any) -> Embedding:
    module = Embedding(arguments.get("in_channels", 128), arguments.get("embed_dims", 256), spiking)
    load(module, _Embedding.rename(params))
    return module.eval()


@official(_REPOSITORY, "Tokenizer")
class Tokenizer(_Embedding):
    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Embedding:
        return _embedding(arguments, params, "")


@official(_REPOSITORY, "Conv1d4EB")
class Conv1d4EB(_Embedding):
    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Embedding:
        return _embedding(arguments, params, "spikes")


@official(_REPOSITORY, "Conv1d4EBMs")
class Conv1d4EBMs(_Embedding):
    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Embedding:
        return _embedding(arguments, params, "membrane")


@official(_REPOSITORY, "ConvFFN", "ConvFFNMs")
class ConvFFN:
    """On `(B, C, N)`."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> FeedForward:
        dim = arguments["in_features"]
        if arguments.get("out_features") not in (None, dim):
            raise ValueError(f"out_features must be in_features = {dim}, got {arguments['out_features']}")
        spikes = arguments.get("act_type", "spike") == "spike"
        membrane = "ConvFFNMs" in arguments["case_name"]
        if membrane and not spikes:
            raise ValueError(f"act_type must be 'spike' in ConvFFNMs, got {arguments['act_type']!r}")
        spiking: Any = "membrane" if membrane else "spikes" if spikes else ""
        module = FeedForward(dim, arguments.get("hidden_features") or dim, spiking)
        load(module, _renamed(params, _MLP))
        return module.eval()

    @staticmethod
    def run(module: FeedForward, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"].mT).mT}


@official(_REPOSITORY, "ConvLMU", "lmu_rnn_conv1d", "slmu_rnn_conv1d", "slmu_rnn_ms_conv1d", ours=Ours)
class ConvLMU:
    """Frames `(B, N, mels)` to logits; which of the three networks it is, the parameters say."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params, _NETWORK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        spiking: Any = "membrane" if "head_bn.weight" in params else ""
        if "patch_embed.rpe_bn.weight" in params:
            spiking = "spikes"
        first = "patch_embed.conv_layers.0.0.weight"
        dim, mels, _ = params[first if first in params else "patch_embed.proj_conv.weight"].shape
        # The window is as long as the sequences that the authors' buffers are made for.
        responses = params.get("block.0.attn.lmu.H")
        net = Ours(
            mels=mels,
            window=128 if responses is None else responses.shape[1],
            dim=dim,
            depth=1 + max(int(n.split(".")[1]) for n in params if n.startswith("block.")),
            mlp_ratio=len(params["block.0.mlp.fc1_conv.weight"]) / dim,
            memory=params["block.0.attn.lmu.W_h.weight"].shape[1] - dim,
            num_classes=len(params["head.weight"]),
            spiking=spiking,
        )
        load(net, ConvLMU.rename(params))
        return net.eval()

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
