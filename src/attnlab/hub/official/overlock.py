"""LMMMEng/OverLoCK (arXiv 2502.20087): the merged kernel, the blocks and the network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.context_block import ContextBlock, LargeKernelBlock
from attnlab.models.vision.overlock import OverLoCK as Ours
from attnlab.models.vision.overlock import Scale
from attnlab.nn.reparam import DilatedReparam

_REPOSITORY = "LMMMEng/OverLoCK"

_REPARAM: tuple[Rule, ...] = (
    (r"(^|\.)lk_origin\.weight$", r"\1large.conv.weight"),
    (r"(^|\.)origin_bn\.", r"\1large.norm."),
    (r"(^|\.)dil_conv_(k\d+_\d+)\.", r"\1branches.\2.conv."),
    (r"(^|\.)dil_bn_(k\d+_\d+)\.", r"\1branches.\2.norm."),
)
_SE: tuple[Rule, ...] = ((r"proj\.1\.(weight|bias)$", r"fc1.\1"), (r"proj\.3\.(weight|bias)$", r"fc2.\1"))
_MLP: tuple[Rule, ...] = (
    (r"mlp\.0\.", "mlp.fc1."),
    (r"mlp\.2\.", "mlp.conv."),
    (r"mlp\.3\.gamma$", "mlp.norm.weight"),
    (r"mlp\.3\.beta$", "mlp.norm.bias"),
    (r"mlp\.4\.", "mlp.fc2."),
)
_STATIC: tuple[Rule, ...] = (
    (r"(^|\.)dwconv\.", r"\1conv."),
    (r"(^|\.)ls\.", r"\1add."),
    (r"(^|\.)proj\.0\.", r"\1norm."),
    (r"(^|\.)proj\.1\.(?=lk_|origin|dil_)", r"\1large."),
    (r"(^|\.)proj\.2\.", r"\1large.last."),
    (r"(^|\.)proj\.3\.proj\.1\.", r"\1se.fc1."),
    (r"(^|\.)proj\.3\.proj\.3\.", r"\1se.fc2."),
    (r"(^|\.)proj\.([4678])\.", lambda m: f"{m[1]}mlp.{int(m[2]) - 4}."),
    *_MLP,
    *_REPARAM,
)
_DYNAMIC: tuple[Rule, ...] = (
    (r"(^|\.)dwconv(\d)\.", r"\1conv\2."),
    (r"(^|\.)ls(\d)\.", r"\1add\2."),
    (r"fusion\.4\.gamma$", "fuse_context.4.weight"),
    (r"fusion\.4\.beta$", "fuse_context.4.bias"),
    (r"fusion\.", "fuse_context."),
    (r"weight_query\.0\.", "mixer.wq.conv."),
    (r"weight_query\.1\.", "mixer.wq.norm."),
    (r"weight_key\.1\.", "mixer.wk.conv."),
    (r"weight_key\.2\.", "mixer.wk.norm."),
    (r"weight_value\.0\.", "mixer.wv.conv."),
    (r"weight_value\.1\.", "mixer.wv.norm."),
    (r"weight_proj\.", "mixer.wp."),
    (r"(dyconv|fusion)_proj\.0\.", "mixer.wo.conv."),
    (r"(dyconv|fusion)_proj\.1\.", "mixer.wo.norm."),
    (r"rpb1$", "mixer.tables.0"),
    (r"rpb2$", "mixer.tables.1"),
    (r"lepe\.0\.", "large."),
    (r"lepe\.1\.", "large.last."),
    (r"se_layer\.proj\.1\.", "se.fc1."),
    (r"se_layer\.proj\.3\.", "se.fc2."),
    (r"gate\.0\.", "gate.conv."),
    (r"gate\.1\.", "gate.norm."),
    (r"(^|\.)proj\.0\.", r"\1out_norm."),
    (r"(^|\.)proj\.1\.", r"\1wo."),
    *_MLP,
    *_REPARAM,
)
_STEM = {
    "0": "0.conv",
    "1": "0.norm",
    "3": "1.conv",
    "4": "1.norm",
    "6": "2.conv",
    "7": "2.norm",
    "9": "3.conv",
    "10": "3.norm",
}
_CONV = {"0": "conv", "1": "norm"}
_NETWORK: tuple[Rule, ...] = (
    (r"^patch_embed1\.(\d+)\.", lambda m: f"stages.0.0.{_STEM[m[1]]}."),
    (r"^patch_embed(\d)\.(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.0.{_CONV[m[2]]}."),
    (r"^patch_embedx\.x_proj\.(\d)\.", lambda m: f"shrink_image.{_CONV[m[1]]}."),
    (r"^patch_embedx\.h_proj\.(\d)\.", lambda m: f"shrink_context.{_CONV[m[1]]}."),
    (r"^high_level_proj\.", "keep."),
    (r"^aux_head\.0\.", "second_norm."),
    (r"^aux_head\.2\.", "second_head."),
    (r"^head\.0\.", "project.conv."),
    (r"^head\.1\.", "project.norm."),
    (r"^head\.4\.", "head."),
)
_LINEAR = re.compile(r"se_layer\.|proj\.3\.proj\.|weight_proj|^head\.4|^aux_head\.2")


def _shaped(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layer scales and response norms as vectors, and 1×1 convolutions that are linear layers here as matrices."""
    shaped = {}
    for name, tensor in params.items():
        if re.search(r"(^|\.)(ls\d?|[xh]_scale)\.weight$|\.(gamma|beta)$", name):
            tensor = tensor.flatten()
        elif tensor.ndim == 4 and tensor.shape[2:] == (1, 1) and re.search(_LINEAR, name):
            tensor = tensor.flatten(1)
        shaped[name] = tensor
    return shaped


class _Module:
    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "DilatedReparamBlock", ours=DilatedReparam)
class Reparam:
    """Maps to maps; and the merged convolution's weight and bias."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, _REPARAM)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> DilatedReparam:
        module = DilatedReparam(arguments["channels"], arguments["kernel_size"])
        load(module, Reparam.rename(params))
        return module.eval()

    @staticmethod
    def run(module: DilatedReparam, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        weight, bias = module.merged()
        return {"y": module(inputs["x"]), "merged_weight": weight, "merged_bias": bias}


def _common(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kernel": arguments.get("kernel_size", 7),
        "mlp_ratio": arguments.get("mlp_ratio", 4),
        "layer_scale": arguments.get("ls_init_value"),
        "scale_branch": not arguments.get("res_scale", False),
        "drop_path": arguments.get("drop_path", 0.0),
    }


@official(_REPOSITORY, "RepConvBlock", ours=LargeKernelBlock)
class RepConvBlock(_Module):
    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(_shaped(params), _STATIC)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> LargeKernelBlock:
        block = LargeKernelBlock(arguments.get("dim", 64), **_common(arguments))
        load(block, RepConvBlock.rename(params))
        return block.eval()


@official(_REPOSITORY, "ContMixBlock", ours=ContextBlock)
class ContMixBlock(_Module):
    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(_shaped(params), _DYNAMIC)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> ContextBlock:
        heads, small = arguments.get("num_heads", 2), arguments.get("smk_size", 5)
        block = ContextBlock(arguments.get("dim", 64), heads=heads, small=small, **_common(arguments))
        load(block, ContMixBlock.rename(params))
        return block.eval()


class Renewed(nn.Module):
    """A block of the focus network with the sum of contexts before it."""

    def __init__(self, block: ContextBlock, first: bool) -> None:
        super().__init__()
        self.block = block
        self.old = None if first else Scale(block.context_dim)
        self.new = None if first else Scale(block.context_dim)

    def forward(self, x: Tensor, context: Tensor, prior: Tensor) -> Tensor:
        if self.old is not None and self.new is not None:
            context = self.old(context) + self.new(prior)
        return self.block(torch.cat((x, context), 1))


@official(_REPOSITORY, "DynamicConvBlock")
class DynamicConvBlock:
    """Image, context and the overview's context to image and context, or, of a last block, both together."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scales: tuple[Rule, ...] = ((r"^x_scale\.", "old."), (r"^h_scale\.", "new."), (r"^(?!old|new)", "block."))
        return rename(rename(_shaped(params), _DYNAMIC), scales)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> tuple[Renewed, bool]:
        block = ContextBlock(
            arguments.get("dim", 64), context_dim=arguments.get("ctx_dim", 32) // 4,
            heads=arguments.get("num_heads", 2), small=arguments.get("smk_size", 5), **_common(arguments),
        )  # fmt: skip
        module = Renewed(block, arguments.get("is_first", False))
        load(module, DynamicConvBlock.rename(params))
        return module.eval(), arguments.get("is_last", False)

    @staticmethod
    def run(module: tuple[Renewed, bool], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        renewed, last = module
        both = renewed(inputs["x"], inputs["h_x"], inputs["h_r"])
        if last:
            return {"y0": both, "y": both}
        x, context = both.split((renewed.block.dim, renewed.block.context_dim), 1)
        return {"y0": x, "y1": context}


@official(_REPOSITORY, "OverLoCK", ours=Ours)
class OverLoCK(_Module):
    """Images to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        depth = len({m[1] for n in params if (m := re.match(r"sub_blocks3\.(\d+)\.", n))})
        found: dict[str, Tensor] = {}
        for name, tensor in _shaped(params).items():
            parts = re.match(r"(sub_)?blocks(\d)\.(\d+)\.(.*)", name)
            if parts is None:
                found |= rename({name: tensor}, _NETWORK)
            elif parts[1] is None:
                ((rest, _),) = rename({parts[4]: tensor}, _STATIC).items()
                found[f"stages.{int(parts[2]) - 1}.{int(parts[3]) + 1}.{rest}"] = tensor
            elif scale := re.match(r"([xh])_scale\.(.*)", parts[4]):
                place = int(parts[3]) - 1 + (depth if parts[2] == "4" else 0)
                found[f"{'old' if scale[1] == 'x' else 'new'}.{place}.{scale[2]}"] = tensor
            else:
                ((rest, _),) = rename({parts[4]: tensor}, _DYNAMIC).items()
                found[f"focus.{int(parts[2]) - 3}.{parts[3]}.{rest}"] = tensor
        return found

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        net = Ours(
            dims=arguments.get("embed_dim", (96, 192, 384, 768)),
            depths=arguments.get("depth", (2, 2, 2, 2)),
            focus_depths=arguments.get("sub_depth", (4, 2)),
            heads=arguments.get("sub_num_heads", (4, 8)),
            kernels=arguments.get("kernel_size", (7, 7, 7, 7)),
            small=arguments.get("smk_size", 5),
            mlp_ratios=arguments.get("mlp_ratio", (4, 4, 4, 4)),
            focus_mlp_ratios=arguments.get("sub_mlp_ratio", (4, 4)),
            layer_scale=arguments.get("ls_init_value", (None, None, 1, 1)),
            scale_branch=not arguments.get("res_scale", True),
            projection=arguments.get("projection", 1024),
            auxiliary="aux_head.2.weight" in params,
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.0),
        )
        load(net, OverLoCK.rename(params))
        return net.eval()
