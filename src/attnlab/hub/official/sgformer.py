"""OliverRensu/SG-Former (arXiv 2308.12216): its attention in three forms, block, stem, merging and network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.skeletons.pyramid import Block as OurBlock
from attnlab.models.vision.sgformer import Merging, Stem, block
from attnlab.models.vision.sgformer import SGFormer as Ours
from attnlab.nn.tokens.self_guided import GROUPS, EnhancedAttention, GuidedAttention, HybridAttention

_REPOSITORY = "OliverRensu/SG-Former"

_ATTENTION: tuple[Rule, ...] = (
    (r"(^|\.)lepe_linear\.", r"\1local.linear."),
    (r"(^|\.)lepe_conv\.", r"\1local.conv."),
    (r"(^|\.)proj\.", r"\1wo."),
    (r"(^|\.)sr\.", r"\1reduce."),
    (r"(^|\.)f(\d)\.", lambda m: f"{m[1]}merging.{int(m[2]) - 1}."),
)
_BLOCK: tuple[Rule, ...] = (
    (r"(^|\.)attn\.", r"\1mixer."),
    (r"mlp\.dwconv\.dwconv\.", "mlp.conv."),
    *_ATTENTION,
)
_CONVS: tuple[Rule, ...] = (
    (r"conv\.([024])\.", lambda m: f"conv{int(m[1]) // 2 + 1}."),
    (r"(conv\d\.)c\.", r"\g<1>0."),
    (r"(conv\d\.)bn\.", r"\g<1>1."),
)


def _attention(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One attention's projections put together as ours are, whichever of the three forms it is; the rest as it is."""
    rest = dict(params)
    for end in ("weight", "bias"):
        if f"q1.{end}" in rest:
            q1, q2, kv1, kv2 = (rest.pop(f"{n}.{end}") for n in ("q1", "q2", "kv1", "kv2"))
            rest[f"wx.{end}"], rest[f"wcoarse.{end}"] = torch.cat((q1, q2, kv2)), kv1
        elif f"kv1.{end}" in rest:
            q, kv1, kv2 = (rest.pop(f"{n}.{end}") for n in ("q", "kv1", "kv2"))
            (k1, v1), (k2, v2) = kv1.chunk(2), kv2.chunk(2)
            rest[f"wqkv.{end}"] = torch.cat((q, k1, k2, v1, v2))
        elif f"kv.{end}" in rest:
            rest[f"wqkv.{end}"] = torch.cat((rest.pop(f"q.{end}"), rest.pop(f"kv.{end}")))
    return rename(rest, _ATTENTION)


def _form(
    params: Mapping[str, Tensor], *, heads: int, reduction: int, window: int = 7
) -> HybridAttention | GuidedAttention | EnhancedAttention:
    dim = len(params["proj.bias"])
    if "q1.weight" in params:
        bias = "q1.bias" in params
        return HybridAttention(dim, heads=heads, reduction=reduction, window=window, bias=bias)
    if "kv1.weight" in params:
        return GuidedAttention(dim, heads=heads, groups=GROUPS[reduction], bias="q.bias" in params)
    return EnhancedAttention(dim, heads=heads, bias="q.bias" in params)


def _below(params: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name.removeprefix(start): t for name, t in params.items() if name.startswith(start)}


class Called(NamedTuple):
    """Modules, and the grid with which the authors' are called."""

    modules: tuple[nn.Module, ...]
    grid: tuple[int, int]


def _grid(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """From the arguments H and W, or from the call, `m(x, H, W, …)`."""
    if "H" in arguments:
        return arguments["H"], arguments["W"]
    said = re.search(r"\(\s*x\s*,\s*(\d+)\s*,\s*(\d+)", arguments.get("call", ""))
    if said is None:
        raise ValueError("arguments must hold H and W, or the call must: m(x, H, W, mask)")
    return int(said[1]), int(said[2])


@official(_REPOSITORY, "Attention")
class Attention:
    """One attention on tokens, or two of them: a hybrid one and one that it guides."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Called:
        pair = any(name.startswith("hybrid.") for name in params)
        modules = []
        for start in ("hybrid.", "guided.") if pair else ("",):
            own = _below(params, start)
            module = _form(own, heads=arguments.get("num_heads", 8), reduction=arguments.get("sr_ratio", 1))
            load(module, _attention(own))
            modules.append(module.eval())
        return Called(tuple(modules), _grid(arguments))

    @staticmethod
    def run(module: Called, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x, first = inputs["x"], module.modules[0]
        if not isinstance(first, HybridAttention):
            return {"y": first(x, grid=module.grid)}
        y, seen = first.scales(x, grid=module.grid)
        outputs = {"y": y, "hybrid": y, "mask_row": seen.flatten(1), "mask_col": seen.mT.flatten(1)}
        if len(module.modules) == 2:
            outputs["guided"] = module.modules[1](x + y, seen, grid=module.grid)
        return outputs


@official(_REPOSITORY, "Block")
class Block:
    """On tokens `(B, N, C)`, of a last stage: others come in pairs."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        attention = {f"attn.{n}": t for n, t in _attention(_below(params, "attn.")).items()}
        return rename({**{n: t for n, t in params.items() if not n.startswith("attn.")}, **attention}, _BLOCK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Called:
        heads, reduction = arguments.get("num_heads", 8), arguments.get("sr_ratio", 1)
        mixer = _form(_below(params, "attn."), heads=heads, reduction=reduction)
        module = block(mixer.dim, mixer, len(params["mlp.fc1.bias"]) / mixer.dim)
        # The network asks for an eps of 1e-6, the block alone has torch's own.
        module.norm1.eps = module.norm2.eps = arguments.get("norm_eps", 1e-5)
        load(module, Block.rename(params))
        return Called((module.eval(),), _grid(arguments))

    @staticmethod
    def run(module: Called, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        (one,) = module.modules
        if not isinstance(one, OurBlock) or isinstance(one.mixer, GuidedAttention):
            raise ValueError("a guided block runs behind its hybrid one: SelfGuidedPair")
        maps = inputs["x"].unflatten(1, module.grid).permute(0, 3, 1, 2)
        return {"y": one(maps).permute(0, 2, 3, 1).flatten(1, 2)}


@official(_REPOSITORY, "Head")
class Head:
    """Images to tokens of a quarter of their size."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Stem:
        dim, in_channels = params["conv.0.c.weight"].shape[:2]
        module = Stem(in_channels, dim)
        load(module, rename(params, _CONVS))
        return module

    @staticmethod
    def run(module: Stem, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"]).permute(0, 2, 3, 1).flatten(1, 2)}


@official(_REPOSITORY, "PatchMerging")
class PatchMerging:
    """Maps to tokens of half their size."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Merging:
        out, dim = params["conv1.c.weight"].shape[:2]
        module = Merging(dim, out)
        load(module, rename(params, _CONVS))
        return module

    @staticmethod
    def run(module: Merging, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"]).permute(0, 2, 3, 1).flatten(1, 2)}


@official(_REPOSITORY, "SGFormer", ours=Ours)
class SGFormer:
    """Images to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        starts = sorted({m[0] for n in params if (m := re.match(r"block\d+\.\d+\.", n))})
        for start in starts:
            stage, index = (int(n) for n in re.findall(r"\d+", start))
            own = _below(params, start)
            place = f"stages.{stage - 1}.blocks."
            if "attn.kv.weight" in own:
                place += f"{index}."
            else:
                place += f"{index // 2}.{'hybrid' if 'attn.q1.weight' in own else 'guided'}."
            found.update({place + name: t for name, t in Block.rename(own).items()})
        for name, tensor in params.items():
            if m := re.match(r"patch_embed(\d+)\.(.*)", name):
                (short,) = rename({m[2]: tensor}, _CONVS)
                found[("stem." if m[1] == "1" else f"stages.{int(m[1]) - 1}.downsample.") + short] = tensor
            elif m := re.match(r"norm(\d+)\.(.*)", name):
                found[f"stages.{int(m[1]) - 1}.norm.{m[2]}"] = tensor
            elif name == "pos_embed":
                found["positions.table"] = tensor[0]
            elif name.startswith("head."):
                found[name] = tensor
        return found

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        ratios = set(arguments.get("mlp_ratios", (4,)))
        if len(ratios) > 1:
            raise ValueError(f"mlp_ratios must be the same in all stages, got {sorted(ratios)}")
        net = Ours(
            dims=arguments.get("embed_dims", (64, 128, 256, 512)),
            depths=arguments.get("depths", (3, 4, 6, 3)),
            heads=arguments.get("num_heads", (1, 2, 4, 8)),
            reductions=arguments.get("sr_ratios", (8, 4, 2, 1)),
            mlp_ratio=ratios.pop(),
            bias=arguments.get("qkv_bias", False),
            image=arguments.get("img_size", 224),
            in_channels=params["patch_embed1.conv.0.c.weight"].shape[1],
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.0),
        )
        load(net, SGFormer.rename(params))
        return net

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
