"""Abdullah-88/NiNformer (arXiv 2403.02411): block, stack of blocks and image classifier; and timm's mixer block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.ninformer import GateBlock
from attnlab.models.vision.ninformer import NiNformer as Ours
from attnlab.nn.tokens.mixer_gate import MixerBlock

_REPOSITORY, _TIMM = "Abdullah-88/NiNformer", "huggingface/pytorch-image-models"

_BLOCK: tuple[Rule, ...] = (
    (r"(^|\.)ffn\.", r"\1mlp."),
    (r"mgu\.proj\.", "mixer.proj."),
    (r"mgu\.Mixer\.", "mixer.mixer."),
    (r"token_mix\.0\.", "norm1."),
    (r"token_mix\.2\.", "token_mlp."),
    (r"channel_mix\.0\.", "norm2."),
    (r"channel_mix\.1\.", "channel_mlp."),
    (r"net\.0\.", "fc1."),
    (r"net\.3\.", "fc2."),
)
_NETWORK: tuple[Rule, ...] = (
    (r"^model\.", "blocks."),
    (r"^patcher\.", "patches."),
    (r"^classifier\.", "head."),
    *_BLOCK,
)
_MIXER: tuple[Rule, ...] = ((r"^mlp_tokens\.", "token_mlp."), (r"^mlp_channels\.", "channel_mlp."))


def _block(arguments: Mapping[str, Any]) -> GateBlock:
    return GateBlock(
        arguments["d_model"],
        tokens=arguments["seq_len"],
        hidden=arguments["d_ffn"],
        dropout=arguments.get("dropout", 0.0),
    )


class _Module:
    rules: tuple[Rule, ...] = ()

    @classmethod
    def rename(cls, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, cls.rules)

    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "NiNBlock")
class NiNBlock(_Module):
    """On tokens."""

    rules = _BLOCK

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> GateBlock:
        block = _block(arguments)
        load(block, NiNBlock.rename(params))
        return block.eval()


@official(_REPOSITORY, "NiNformer")
class NiNformer(_Module):
    """Tokens to tokens: the blocks alone."""

    rules = ((r"^model\.", ""), *_BLOCK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> nn.Sequential:
        blocks = nn.Sequential(*(_block(arguments) for _ in range(arguments["num_layers"])))
        load(blocks, NiNformer.rename(params))
        return blocks.eval()


@official(_REPOSITORY, "NiNformerImageClassification", ours=Ours)
class NiNformerImageClassification(_Module):
    """Images to logits."""

    rules = _NETWORK

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        net = Ours(
            image=arguments.get("image_size", 32),
            patch=arguments.get("patch_size", 4),
            dim=arguments.get("d_model", 256),
            hidden=arguments.get("d_ffn", 512),
            depth=arguments.get("num_layers", 4),
            in_channels=arguments.get("in_channels", 3),
            num_classes=arguments.get("num_classes", 10),
            dropout=arguments.get("dropout", 0.5),
        )
        load(net, NiNformerImageClassification.rename(params))
        return net.eval()


@official(_TIMM, "MixerBlock")
class TimmMixerBlock(_Module):
    """On tokens; its norms must have eps 1e-5 to be ours."""

    rules = _MIXER

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> MixerBlock:
        tokens, channels = params["mlp_tokens.fc1.weight"].shape[0], params["mlp_channels.fc1.weight"].shape[0]
        if tokens != channels:
            raise ValueError(f"both hidden widths must be one and the same, got {tokens} and {channels}")
        block = MixerBlock(arguments["dim"], arguments["seq_len"], tokens)
        load(block, TimmMixerBlock.rename(params))
        return block.eval()
