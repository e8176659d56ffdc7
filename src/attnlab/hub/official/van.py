"""Visual-Attention-Network/VAN-Classification (arXiv 2202.09741): the gate, its mixer, the block and the network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.van import VAN as Ours
from attnlab.models.vision.van import LargeKernelBlock
from attnlab.nn.spatial.large_kernel import LargeKernelAttention, LargeKernelMixer

_REPOSITORY = "Visual-Attention-Network/VAN-Classification"

_RULES: tuple[Rule, ...] = (
    (r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
    (r"^patch_embed1\.proj\.", "stem.conv."),
    (r"^patch_embed1\.norm\.", "stem.norm."),
    (r"^patch_embed(\d)\.proj\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.conv."),
    (r"^patch_embed(\d)\.norm\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.norm."),
    (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
)
_BLOCK: tuple[Rule, ...] = (
    (r"(^|\.)attn\.", r"\1mixer."),
    (r"spatial_gating_unit\.", "lka."),
    (r"(^|\.)proj_1\.", r"\1wi."),
    (r"(^|\.)proj_2\.", r"\1wo."),
    (r"(^|\.)conv0\.", r"\1near."),
    (r"(^|\.)conv_spatial\.", r"\1far."),
    (r"(^|\.)conv1\.", r"\1wm."),
    (r"dwconv\.dwconv\.", "dwconv."),
    (r"layer_scale_(\d)$", r"scale\1"),
)


def _renamed(params: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """Our names; 1×1 convolutions become the linear layers that they are."""
    flat = {n: t.flatten(1) if t.ndim == 4 and t.shape[2:] == (1, 1) else t for n, t in params.items()}
    return rename(flat, rules)


class _Module:
    """On maps `(B, C, H, W)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params, _BLOCK)

    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(*inputs.values())}


@official(_REPOSITORY, "LKA", ours=LargeKernelAttention)
class LKA(_Module):
    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> LargeKernelAttention:
        module = LargeKernelAttention(arguments["dim"])
        load(module, LKA.rename(params))
        return module


@official(_REPOSITORY, "Attention", ours=LargeKernelMixer)
class Attention(_Module):
    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> LargeKernelMixer:
        module = LargeKernelMixer(arguments["d_model"])
        load(module, Attention.rename(params))
        return module


@official(_REPOSITORY, "Block", ours=LargeKernelBlock)
class Block(_Module):
    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> LargeKernelBlock:
        block = LargeKernelBlock(arguments["dim"], mlp_ratio=arguments.get("mlp_ratio", 4.0))
        load(block, Block.rename(params))
        return block.eval()


@official(_REPOSITORY, "VAN", ours=Ours)
class VAN(_Module):
    """Images to logits. The class's layer norms have eps 1e-5; its registered sizes, and ours, 1e-6."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(params, (*_RULES, *_BLOCK))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        eps = re.search(r"eps\D*?(\d[\d.]*(?:e-?\d+)?)", str(arguments.get("norm_layer", "")))
        net = Ours(
            dims=arguments.get("embed_dims", (64, 128, 256, 512)),
            depths=arguments.get("depths", (3, 4, 6, 3)),
            mlp_ratios=arguments.get("mlp_ratios", (4, 4, 4, 4)),
            norm_eps=float(eps[1]) if eps else 1e-5,
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.0),
        )
        load(net, VAN.rename(params))
        return net.eval()
