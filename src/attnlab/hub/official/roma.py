"""MiliLab/RoMA (arXiv 2503.10392): its blocks, its losses, and checkpoints of pre-training and of the encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.hub.official import mamba, official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.roma import RoMA, RoMABlock
from attnlab.recipes.roma import DrawingBlock, RoMAPretraining, Segments, blocks, drawing_losses, pixels

_REPOSITORY = "MiliLab/RoMA"

# Of their SwiGLU w1 is the gate and w3 comes last; of ours, w2 comes last.
_BLOCK: tuple[Rule, ...] = (
    (r"(^|\.)mlp\.w2\.", r"\1mlp.third."),
    (r"(^|\.)mlp\.w3\.", r"\1mlp.w2."),
    (r"(^|\.)mlp\.third\.", r"\1mlp.w3."),
)
_DECODER: tuple[Rule, ...] = (
    (r"(^|\.)attn2\.proj\.", r"\1attention.wo."),
    (r"(^|\.)attn2\.", r"\1attention."),
    (r"(^|\.)norm2_1\.", r"\1norm_q."),
    (r"(^|\.)norm2_2\.", r"\1norm_kv."),
)
_NETWORK: tuple[Rule, ...] = (
    (r"^patch_embed\.proj\.", "encoder.patches."),
    (r"^layers\.", "encoder.blocks."),
    (r"^norm_4\.", "encoder.norm."),
    (r"^norm_(\d)\.", lambda m: f"norms.{int(m[1]) - 1}."),
    (r"^dec_block\.", "blocks."),
    (r"^enc2dec\.", "widen."),
    (r"^ar_norm\.", "norm."),
    (r"^ar_pred\.", "draw."),
    (r"^ar_token$", "token"),
    (r"^angle_embed$", "angle"),
)
_FIXED = ("pos_embed", "dec_pos_embed", "mask")


def block(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return mamba.layer(rename(params, _BLOCK))


def decoder(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours = rename(params, _DECODER)
    for name in [n for n in ours if ".q." in n]:
        kv = name.replace(".q.", ".kv.")
        ours[name.replace(".q.", ".wqkv.")] = torch.cat((ours.pop(name), ours.pop(kv)))
    return ours


@official(_REPOSITORY, "mamba_simple.Mamba", "Mamba")
class RoMAMamba(mamba.MambaMixer):
    """Their copy of Mamba, one direction."""


@official(_REPOSITORY, "models_mamba.Block", "Block", ours=RoMABlock)
class Block:
    """Mamba and SwiGLU, each on its residual path."""

    rename = staticmethod(block)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> RoMABlock:
        module = RoMABlock(len(params["norm1.weight"]), states=params["mixer.A_log"].shape[1])
        load(module, block(params))
        return module

    @staticmethod
    def run(module: RoMABlock, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


class _Masked(nn.Module):
    def __init__(self, module: DrawingBlock, size: int) -> None:
        super().__init__()
        self.module, self.pattern = module, Segments(size)


@official(_REPOSITORY, "models_mamba.DecoderBlock", "DecoderBlock", ours=DrawingBlock)
class DecoderBlock:
    """With the mask of segments, whose length the call names: mask_generate(3 segments, 4 tokens)."""

    rename = staticmethod(decoder)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> _Masked:
        said = re.search(r"mask_generate\(\s*\d+[^,]*,\s*(\d+)", arguments["call"])
        if said is None:
            raise ValueError(f"call must name the mask, mask_generate(segments, tokens), got {arguments['call']!r}")
        module = DrawingBlock(
            arguments["dim"], heads=arguments["num_heads"], mlp_ratio=arguments.get("mlp_ratio", 4.0),
            bias=arguments.get("qkv_bias", False),
        )  # fmt: skip
        load(module, decoder(params))
        return _Masked(module, int(said[1]))

    @staticmethod
    def run(module: _Masked, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module.module(inputs["q"], inputs["kv"], module.pattern)}


@official(_REPOSITORY, "VisionMamba.forward_loss")
class Losses:
    """Both losses of predictions and images; patches are as large as the predictions say."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> None:
        return None

    @staticmethod
    def run(module: None, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        images, drawn = inputs["imgs"], inputs["pred"]
        patch = int((drawn.shape[2] / images.shape[1]) ** 0.5)
        grid = (images.shape[2] // patch, images.shape[3] // patch)
        fine, _ = drawing_losses(drawn, images, patch=patch, variant="release")
        pred6, target6 = blocks(drawn, pixels(images, patch), grid, variant="release")
        coarse = F.mse_loss(pred6, target6)
        return {"l1": fine, "l6": coarse, "pred6": pred6, "target6": target6, "total": fine + 0.1 * coarse}


@official(_REPOSITORY, "VisionMamba", ours=RoMAPretraining)
class VisionMamba:
    """The pre-training network; positions and the mask, which are fixed, are left out."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {n: t for n, t in params.items() if n not in _FIXED}
        ours = rename(decoder(block(kept)), _NETWORK)
        return {n: t.flatten() if n in ("token", "angle") else t for n, t in ours.items()}

    @classmethod
    def build(cls, arguments: dict[str, Any], params: dict[str, Tensor]) -> RoMAPretraining:
        depth = 1 + max(int(n.split(".")[1]) for n in params if n.startswith("layers."))
        weight = params["patch_embed.proj.weight"]
        encoder = RoMA(
            dim=len(weight), depth=depth, patch=weight.shape[2], in_channels=weight.shape[1], num_classes=0,
            states=params["layers.0.mixer.A_log"].shape[1],
        )  # fmt: skip
        net = RoMAPretraining(encoder, width=params["ar_token"].shape[-1], variant="release")
        load(net, cls.rename(params))
        return net

    @staticmethod
    def run(module: RoMAPretraining, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"], inputs.get("ori_imgs"), inputs.get("turned"))}


@official(_REPOSITORY, "VisionMamba encoder", ours=RoMA)
class Encoder:
    """The encoder alone, of a pre-training checkpoint: what serves the pre-training only is left out."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ours = VisionMamba.rename(params)
        return {n.removeprefix("encoder."): t for n, t in ours.items() if n.startswith("encoder.")}

    @classmethod
    def build(cls, arguments: dict[str, Any], params: dict[str, Tensor]) -> RoMA:
        return VisionMamba.build(arguments, params).encoder

    @staticmethod
    def run(module: RoMA, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
