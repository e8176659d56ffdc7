"""henry-pay/SpaRTAN (arXiv 2507.10999): the spatial and the channel mixer, and the network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.spartan import SpaRTAN as Ours
from attnlab.nn.channel.wave import WaveMixer
from attnlab.nn.spatial.smixer import SMixer as OurSMixer

_REPOSITORY = "henry-pay/SpaRTAN"

_SE: tuple[Rule, ...] = (
    (r"(^|\.)([hl]_)?attn\.", lambda m: f"{m[1]}{ {'h_': 'near_', 'l_': 'far_', None: ''}[m[2]] }se."),
    (r"se\.squeeze\.", "se.fc1."),
    (r"se\.expand\.", "se.fc2."),
)
_SPATIAL: tuple[Rule, ...] = (
    (r"h_conv\.", "near."),
    (r"l_conv\.0\.conv\.", "far1."),
    (r"l_conv\.1\.", "far2."),
    (r"proj_in\.", "proj."),
    (r"proj_out\.", "wo."),
    *_SE,
)
_WAVE: tuple[Rule, ...] = ((r"complex$", "turn"), (r"proj_out\.", "wo."), *_SE)
_NETWORK: tuple[Rule, ...] = (
    (r"^conv\.", "stem."),
    (r"^linear\.", "head."),
    (r"norm_(\d)\.", r"norm\1."),
    (r"scale_(\d)$", r"scale\1"),
)


def _fused(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`theta` and `proj` of a channel mixer as the one linear layer that they make together."""
    fused = dict(params)
    for name in params:
        if found := re.search(r"^(.*?)theta\.(weight|bias)$", name):
            pair = [
                fused.pop(f"{found[1]}{part}.{found[2]}").flatten(1 if found[2] == "weight" else 0)
                for part in ("theta", "proj")
            ]
            fused[f"{found[1]}wtp.{found[2]}"] = torch.cat(pair)
    return fused


def _shaped(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scales, turns and 1×1 convolutions without the axes of size 1 that ours do not have."""
    shaped = {}
    for name, tensor in params.items():
        if re.search(r"(^|\.)(fc\d|proj|wo)\.weight$", name):
            tensor = tensor.flatten(1)
        elif re.search(r"(^|\.)(gamma|scale\d)$", name):
            tensor = tensor.reshape(-1, 1, 1)
        elif re.search(r"(^|\.)turn$", name):
            tensor = tensor.reshape(-1, 2)
        shaped[name] = tensor
    return shaped


@official(_REPOSITORY, "SMixer", ours=OurSMixer)
class SMixer:
    """On maps `(B, C, H, W)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _shaped(rename(params, _SPATIAL))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> OurSMixer:
        module = OurSMixer(arguments["in_dim"], depthwise=arguments["conv_groups"] > 1)
        load(module, SMixer.rename(params))
        return module.eval()

    @staticmethod
    def run(module: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "CMixer", ours=WaveMixer)
class CMixer:
    """On maps `(B, C, H, W)`; the groups given are those of the spatial mixer, 1 or many."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _shaped(rename(_fused(params), _WAVE))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> WaveMixer:
        module = WaveMixer(
            arguments["in_dim"], ratio=arguments["expand_ratio"], depthwise=arguments["conv_groups"] == 1
        )
        load(module, CMixer.rename(params))
        return module.eval()

    run = SMixer.run


@official(_REPOSITORY, "SpaRTAN", ours=Ours)
class SpaRTAN:
    """Images to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = sorted({int(m[1]) for name in params if (m := re.match(r"layers\.(\d+)\.", name))})
        merges = {row for row in rows if f"layers.{row}.conv.weight" in params}
        places, stage, index = {}, 0, 0
        for row in rows:  # one row of blocks and mergings
            if row in merges:
                stage, index = stage + 1, 0
                places[row] = f"stages.{stage}.downsample."
            else:
                places[row], index = f"stages.{stage}.blocks.{index}.", index + 1
        ours: dict[str, Tensor] = {}
        mixers: dict[str, dict[str, Tensor]] = {}
        for name, tensor in params.items():
            name = re.sub(r"^layers\.(\d+)\.", lambda m: places[int(m[1])], name)
            if found := re.match(r"(.*\.)([sc]mixer)\.(.*)", name):
                mixers.setdefault(found[1] + found[2], {})[found[3]] = tensor
            else:
                ours[name] = tensor
        ours = _shaped(rename(ours, _NETWORK))
        for where, inner in mixers.items():
            block, kind = where.rsplit(".", 1)
            adapter, slot = (SMixer, "mixer") if kind == "smixer" else (CMixer, "wave")
            ours.update({f"{block}.{slot}.{n}": t for n, t in adapter.rename(inner).items()})
        return ours

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        stages, first = arguments["num_layer"], arguments.get("init_dim", 32)
        dims = arguments.get("dims") or [first * 2**stage for stage in range(1, stages)]
        net = Ours(
            dims=(first, *dims),
            depths=arguments["layer_depths"],
            ratios=arguments.get("expand_ratios") or (1,) * stages,
            num_classes=arguments["num_classes"],
            drop_path=arguments.get("dropout", 0.0),
        )
        load(net, SpaRTAN.rename(params))
        return net.eval()

    run = SMixer.run
