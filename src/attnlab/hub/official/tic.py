"""zs670980918/MSA-Conv (arXiv 2310.04134): the operator, as its validation script has it, and the layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import load, rename
from attnlab.nn.spatial.convolutional import MSAConv, conv_attend, pair

_REPOSITORY = "zs670980918/MSA-Conv"


@official(_REPOSITORY, "cascade_test")
class Core:
    """On maps `(B, C, H, W)` without a scale: scores and weights `(B, kh·kw, H, W)`, and the output."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
        return {name: pair(name, arguments[given]) for name, given in (("kernel", "kernel_size"), ("dilation",) * 2)}

    @staticmethod
    def run(module: dict[str, tuple[int, int]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        q, k = inputs["q"], inputs["k"]
        padding = tuple(d * (n // 2) for n, d in zip(module["kernel"], module["dilation"], strict=True))
        windows = F.unfold(k, module["kernel"], module["dilation"], padding)
        dot = (q[:, :, None] * windows.view(*k.shape[:2], -1, *k.shape[2:])).sum(1)
        heads = [inputs[n].permute(0, 2, 3, 1)[:, None] for n in "qkv"]
        out = conv_attend(
            heads[0], heads[1], heads[2], kernel=module["kernel"], dilation=module["dilation"], scale=1.0, dropout=0.0
        )
        return {"dot": dot, "attn": dot.softmax(1), "y": out[:, 0].permute(0, 3, 1, 2)}


@official(_REPOSITORY, "MSA_Conv_2d", ours=MSAConv)
class Layer:
    """On maps `(B, C, H, W)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed = rename(params, ((r"^qkv_conv\.", "wqkv."), (r"^mlp\.", "conv.")))
        return {n: t.flatten(1) if n == "wqkv.weight" else t for n, t in renamed.items()}

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> MSAConv:
        module = MSAConv(
            arguments["input_channel"],
            out_dim=arguments["output_channel"],
            kernel=arguments["kernel_size"],
            dilation=arguments.get("dilation", 1),
            stride=arguments.get("stride", 1),
            padding=arguments.get("padding", 0),
            bias="mlp.bias" in params,
            dropout=arguments.get("dropout", 0.1),
        )
        load(module, Layer.rename(params))
        return module

    @staticmethod
    def run(module: MSAConv, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
