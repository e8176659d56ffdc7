"""badripatro/SpectFormers (arXiv 2304.06446): the spectral gate, the blocks, and the networks of both folders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.skeletons.local_mlp import LocalMLP
from attnlab.models.skeletons.plain import TokenBlock
from attnlab.models.skeletons.pyramid import Block
from attnlab.models.vision.spectformer import SpectFormer as Ours
from attnlab.models.vision.spectformer import SpectralBlock, VanillaSpectFormer
from attnlab.models.vision.volo import ClassBlock as OurClassBlock
from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.spectral_gating import SpectralGating

_REPOSITORY = "badripatro/SpectFormers"
_VANILLA, _PYRAMID = "vanilla_architecture/spectformer.py", "hierarchical_architecture/spectformer.py"

_BLOCK: tuple[Rule, ...] = (
    (r"(^|\.)(attn|filter)\.complex_weight$", r"\1mixer.filter"),
    (r"(^|\.)attn\.proj\.", r"\1mixer.wo."),
    (r"(^|\.)attn\.(q|kv|qkv)\.", r"\1mixer.w\2."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
)
_NETWORK: tuple[Rule, ...] = (
    (r"^patch_embed1\.", "stem."),
    (r"^patch_embed(\d)\.proj\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.conv."),
    (r"^patch_embed(\d)\.norm\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.norm."),
    (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
    (r"^post_network\.0\.", "class_block."),
    (r"^aux_head\.", "dense_head."),
    *_BLOCK,
)
_PLAIN: tuple[Rule, ...] = (
    (r"^patch_embed\.proj\.", "patches."),
    (r"^pos_embed$", "positions.table"),
    (r"^blocks\.", "encoder.blocks."),
    (r"^norm\.", "encoder.norm."),
    *_BLOCK,
)


def _joined(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Separate projections q and kv in one, as attention among places has it; class attention keeps two."""
    joined = dict(params)
    for name in [n for n in params if re.search(r"(^|\.)mixer\.wq\.(weight|bias)$", n)]:
        if not name.startswith("class_block."):
            other = name.replace(".wq.", ".wkv.")
            joined[name.replace(".wq.", ".wqkv.")] = torch.cat((joined.pop(name), joined.pop(other)))
    return joined


class _Called(nn.Module):
    """A module with the grid that its calls are about."""

    def __init__(self, module: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self.module, self.grid = module, grid


def _grid(arguments: Mapping[str, Any], default: tuple[int, int] | None = None) -> tuple[int, int]:
    call = arguments.get("call", "")
    for pattern in (r"spatial_size\s*=\s*\(\s*(\d+)\s*,\s*(\d+)", r"H\s*=\s*(\d+)\s*,\s*W\s*=\s*(\d+)"):
        if said := re.search(pattern, call):
            return int(said[1]), int(said[2])
    if default is None:
        raise ValueError("the map's size must be given: a call that says H=…, W=…")
    return default


def _square(arguments: Mapping[str, Any]) -> tuple[int, int]:
    height = arguments.get("h", 14)
    return _grid(arguments, (height, height))


@official(_REPOSITORY, "SpectralGatingNetwork", ours=SpectralGating)
class SpectralGatingNetwork:
    """On tokens (B, N, C); their grid is a square unless the call says it."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, ((r"^complex_weight$", "filter"),))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> _Called:
        weight = params["complex_weight"]
        module = SpectralGating(arguments["dim"], spectrum=(weight.shape[0], weight.shape[1]))
        load(module, SpectralGatingNetwork.rename(params))
        return _Called(module, _square({"h": weight.shape[0], **arguments}))

    @staticmethod
    def run(module: _Called, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module.module(inputs["x"], grid=module.grid)}


@official(_REPOSITORY, f"{_VANILLA} Block")
class VanillaBlock(SpectralGatingNetwork):
    """The block of the gate, on tokens (B, N, C)."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, _BLOCK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> _Called:
        dim, weight = arguments["dim"], params["filter.complex_weight"]
        gate = SpectralGating(dim, spectrum=(weight.shape[0], weight.shape[1]))
        block = SpectralBlock(dim, gate, mlp_ratio=arguments.get("mlp_ratio", 4.0))
        load(block, VanillaBlock.rename(params))
        return _Called(block.eval(), _square({"h": weight.shape[0], **arguments}))


@official(_REPOSITORY, f"{_VANILLA} Block_attention")
class VanillaAttentionBlock:
    """The block of softmax attention with six heads, on tokens (B, N, C)."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> TokenBlock:
        dim = arguments["dim"]
        block = TokenBlock(dim, MultiHead(dim, heads=6, bias=True), mlp_ratio=arguments.get("mlp_ratio", 4.0))
        load(block, rename(params, _BLOCK))
        return block.eval()

    @staticmethod
    def run(module: TokenBlock, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, f"{_VANILLA} SpectFormer", ours=VanillaSpectFormer)
class Vanilla:
    """Images to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: t.flatten(0, -2) if n == "positions.table" else t for n, t in rename(params, _PLAIN).items()}

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> VanillaSpectFormer:
        if arguments.get("representation_size"):
            raise ValueError(f"representation_size must be None, got {arguments['representation_size']}")
        net = VanillaSpectFormer(
            dim=arguments.get("embed_dim", 768),
            depth=arguments.get("depth", 12),
            spectral=sum(n.endswith("complex_weight") for n in params),
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            image=arguments.get("img_size", 224),
            patch=arguments.get("patch_size", 16),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            head_dropout=arguments.get("dropcls", 0.0),
        )
        load(net, Vanilla.rename(params))
        return net.eval()

    @staticmethod
    def run(module: VanillaSpectFormer, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(next(iter(inputs.values())))}


@official(_REPOSITORY, f"{_PYRAMID} Block")
class PyramidBlock:
    """On tokens (B, H·W, C); the map's size stands in the call."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> _Called:
        dim = arguments["dim"]
        mixer: nn.Module
        if arguments.get("block_type", "wave") == "std_att":
            mixer = MultiHead(dim, heads=arguments["num_heads"], bias=True)
        else:
            weight = params["attn.complex_weight"]
            mixer = SpectralGating(dim, spectrum=(weight.shape[0], weight.shape[1]))
        block = Block(dim, mixer, layout="tokens", mlp=LocalMLP(dim, int(dim * arguments["mlp_ratio"])))
        load(block, _joined(rename(params, _BLOCK)))
        return _Called(block.eval(), _grid(arguments))

    @staticmethod
    def run(module: _Called, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        maps = inputs["x"].unflatten(1, module.grid).permute(0, 3, 1, 2)
        return {"y": module.module(maps).permute(0, 2, 3, 1).flatten(1, 2)}


@official(_REPOSITORY, f"{_PYRAMID} ClassBlock")
class ClassBlock:
    """Tokens (B, 1 + N, C), of which the first, the class token, changes."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> OurClassBlock:
        heads, ratio = arguments["num_heads"], arguments["mlp_ratio"]
        block = OurClassBlock(arguments["dim"], heads=heads, mlp_ratio=ratio, qkv_bias=True)
        load(block, rename(params, _BLOCK))
        return block.eval()

    @staticmethod
    def run(module: OurClassBlock, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        return {"y": torch.cat((module(x[:, :1], x[:, 1:]), x[:, 1:]), dim=1)}


@official(_REPOSITORY, f"{_PYRAMID} SpectFormer", ours=Ours)
class Pyramid:
    """Images to logits; in training to class logits, place logits and the mixed box."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        last = max((int(m[1]) for n in params if (m := re.match(r"norm(\d)\.", n))), default=4)

        def stage_norm(m: re.Match[str]) -> str:
            return "norm." if int(m[1]) == last else f"stages.{int(m[1]) - 1}.norm."

        return _joined(rename(params, ((r"^norm(\d)\.", stage_norm), *_NETWORK)))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        filters = [t for n, t in params.items() if n.startswith("block1.0.attn.complex_weight")]
        given = arguments.get("norm_layer")
        net = Ours(
            dims=arguments.get("embed_dims", (64, 128, 320, 448)),
            depths=arguments.get("depths", (3, 4, 6, 3)),
            heads=arguments.get("num_heads", (2, 4, 10, 14)),
            mlp_ratios=arguments.get("mlp_ratios", (8, 8, 4, 4)),
            stem=arguments.get("stem_hidden_dim", 32),
            image=4 * len(filters[0]) if filters else 224,
            dense=arguments.get("token_label", True),
            eps=given.keywords.get("eps", 1e-5) if isinstance(given, partial) else 1e-6 if given else 1e-5,
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.0),
        )
        load(net, Pyramid.rename(params))
        return net.eval()

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(next(iter(inputs.values())))}
