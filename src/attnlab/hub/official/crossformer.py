"""cheerss/CrossFormer (arXiv 2108.00154, 2303.06908): attention, block, embeddings and the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision.crossformer import CrossFormer as Ours
from attnlab.models.vision.crossformer import CrossScale, CrossScaleBlock
from attnlab.nn.spatial.cross_scale import LongShortDistance
from attnlab.nn.spatial.groups import Groups

_REPOSITORY = "cheerss/CrossFormer"

_ATTENTION: tuple[Rule, ...] = (
    (r"(^|\.)qkv\.", r"\1wqkv."),
    (r"(^|\.)pos\.pos_proj\.", r"\1relative.mlp.0."),
    (r"(^|\.)pos\.pos(\d)\.0\.", lambda m: f"{m[1]}relative.mlp.{3 * int(m[2]) - 2}."),
    (r"(^|\.)pos\.pos(\d)\.2\.", lambda m: f"{m[1]}relative.mlp.{3 * int(m[2])}."),
)
_MIXER: tuple[Rule, ...] = (*_ATTENTION, (r"(^|\.)proj\.", r"\1wo."))
_BLOCK: tuple[Rule, ...] = (
    *_ATTENTION,
    (r"(^|\.)attn\.proj\.", r"\1mixer.wo."),
    (r"(^|\.)attn\.", r"\1mixer."),
    (r"(^|\.)ex_conv\.", r"\1cooling.0."),
    (r"(^|\.)ex_ln\.", r"\1cooling.1."),
)
_STEM: tuple[Rule, ...] = ((r"^projs\.", "convs."), (r"^norm\.", "after."))
_MERGE: tuple[Rule, ...] = ((r"^reductions\.", "convs."), (r"^norm\.", "before."))
_NETWORK: tuple[Rule, ...] = (
    (r"^patch_embed\.projs\.", "stem.convs."),
    (r"^patch_embed\.norm\.", "stem.after."),
    (r"^layers\.(\d+)\.downsample\.norm\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.before."),
    (r"^layers\.(\d+)\.downsample\.reductions\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.convs."),
    (r"^layers\.", "stages."),
    *_BLOCK,
)


def _kernels(arguments: Mapping[str, Any], default: tuple[int, ...]) -> list[int]:
    sizes = arguments.get("patch_size", default)
    return [sizes] if isinstance(sizes, int) else list(sizes)


@official(_REPOSITORY, "Attention")
class Attention:
    """On the tokens of groups, `(groups · B, Gh·Gw, C)`; the argument `group_size` is one number or two."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, _MIXER)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> tuple[LongShortDistance, tuple[int, int]]:
        size = arguments["group_size"]
        height, width = (size, size) if isinstance(size, int) else size
        module = LongShortDistance(
            arguments["dim"], heads=arguments["num_heads"], window=max(height, width), bias="qkv.bias" in params,
            biased="pos.pos_proj.weight" in params,
        )  # fmt: skip
        load(module, Attention.rename(params))
        return module.eval(), (height, width)

    @staticmethod
    def run(module: tuple[LongShortDistance, tuple[int, int]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        attention, size = module
        return {"y": attention.within(Groups(size, size), *attention.qkv(inputs["x"]))}


@official(_REPOSITORY, "CrossFormerBlock")
class CrossFormerBlock:
    """On tokens `(B, H·W, C)`, whose grid is the argument `input_resolution`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, _BLOCK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> tuple[CrossScaleBlock, tuple[int, int]]:
        far = arguments.get("lsda_flag", 0) == 1
        mixer = LongShortDistance(
            arguments["dim"],
            heads=arguments["num_heads"],
            window=arguments.get("group_size", 7),
            interval=arguments.get("interval", 8) if far else 1,
            bias="attn.qkv.bias" in params,
        )
        ratio = arguments.get("mlp_ratio", 4.0)
        block = CrossScaleBlock(arguments["dim"], mixer, cooling="ex_conv.weight" in params, mlp=ratio)
        load(block, CrossFormerBlock.rename(params))
        height, width = arguments["input_resolution"]
        return block.eval(), (height, width)

    @staticmethod
    def run(module: tuple[CrossScaleBlock, tuple[int, int]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        block, grid = module
        x = inputs["x"].unflatten(1, grid).permute(0, 3, 1, 2)
        return {"y": block(x).permute(0, 2, 3, 1).flatten(1, 2)}


@official(_REPOSITORY, "PatchEmbed")
class PatchEmbed:
    """Images to tokens `(B, N, C)`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, _STEM)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> CrossScale:
        kernels = _kernels(arguments, (4,))
        input_dim, dim = params["projs.0.weight"].shape[1], arguments.get("embed_dim", 96)
        module = CrossScale(input_dim, dim, kernels[0], kernels=kernels, after="norm.weight" in params)
        load(module, PatchEmbed.rename(params))
        return module

    @staticmethod
    def run(module: CrossScale, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"]).flatten(2).transpose(1, 2)}


@official(_REPOSITORY, "PatchMerging")
class PatchMerging:
    """On tokens `(B, H·W, C)`, whose grid is the argument `input_resolution`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, _MERGE)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> tuple[nn.Module, tuple[int, int]]:
        dim = arguments["dim"]
        module = CrossScale(dim, 2 * dim, 2, kernels=_kernels(arguments, (2,)), before=True)
        load(module, PatchMerging.rename(params))
        height, width = arguments["input_resolution"]
        return module, (height, width)

    @staticmethod
    def run(module: tuple[nn.Module, tuple[int, int]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        merge, grid = module
        x = inputs["x"].unflatten(1, grid).permute(0, 3, 1, 2)
        return {"y": merge(x).flatten(2).transpose(1, 2)}


@official(_REPOSITORY, "CrossFormer", ours=Ours)
class CrossFormer:
    """Images to logits; CrossFormer++ (`use_acl=True`) with constant group sizes too."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, _NETWORK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        plain = {"ape": False, "use_cpe": False, "no_mask": False, "adaptive_interval": False, "group_type": "constant"}
        if other := [name for name, value in plain.items() if arguments.get(name, value) != value]:
            raise ValueError(f"{', '.join(other)} must be as in the published models, {[plain[n] for n in other]}")
        depths = arguments.get("depths", (2, 2, 6, 2))
        stages = len(depths)
        net = Ours(
            dim=arguments.get("embed_dim", 96),
            depths=depths,
            heads=arguments.get("num_heads", (3, 6, 12, 24)),
            windows=arguments.get("group_size", (7, 7, 7, 7))[:stages],
            intervals=arguments.get("crs_interval", (8, 4, 2, 1))[:stages],
            kernels=_kernels(arguments, (4,)),
            merges=arguments.get("merge_size", [[2]] * (stages - 1)),
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            cooling=any("ex_conv." in name for name in params),
            bias=arguments.get("qkv_bias", True),
            patch_norm=arguments.get("patch_norm", True),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.1),
        )
        load(net, CrossFormer.rename(params))
        return net.eval()

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
