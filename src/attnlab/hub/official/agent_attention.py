"""LeapLabTHU/Agent-Attention (arXiv 2312.08874): its three attention modules, and the parts of AgentSD."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.official.vit import PLAIN, flat
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.vision import agent_vit as vision
from attnlab.nn.tokens.agent import AgentAttention
from attnlab.recipes.agent_sd import Merging, match, through_agents

_REPOSITORY = "LeapLabTHU/Agent-Attention"

MODULE: tuple[Rule, ...] = (
    (r"(^|\.)qkv\.", r"\1wqkv."),
    (r"(^|\.)proj\.", r"\1wo."),
    (r"(^|\.)dwc\.", r"\1local."),
    (r"(^|\.)sr\.", r"\1reduce."),
    (r"(^|\.)an_bias$", r"\1aggregate.coarse"),
    (r"(^|\.)ah_bias$", r"\1aggregate.rows"),
    (r"(^|\.)aw_bias$", r"\1aggregate.columns"),
    (r"(^|\.)ac_bias$", r"\1aggregate.place"),
    (r"(^|\.)na_bias$", r"\1broadcast.coarse"),
    (r"(^|\.)ha_bias$", r"\1broadcast.rows"),
    (r"(^|\.)wa_bias$", r"\1broadcast.columns"),
    (r"(^|\.)ca_bias$", r"\1broadcast.place"),
)


def agent_first(params: Mapping[str, Tensor], rules: tuple[Rule, ...] = MODULE) -> dict[str, Tensor]:
    """Our names; every bias table as (heads, agents, places…); PVT's `q` and `kv` joined to `wqkv`."""
    renamed = {}
    for name, tensor in rename(params, rules).items():
        if re.search(r"(aggregate|broadcast)\.(rows|columns|place)$", name):
            tensor = tensor.squeeze(0)
            tensor = tensor.movedim(-1, 1) if "broadcast" in name else tensor
        renamed[name] = tensor
    for name in [n for n in renamed if re.search(r"(^|\.)q\.(weight|bias)$", n)]:
        before, after = re.split(r"(?<![^.])q\.", name)
        renamed[f"{before}wqkv.{after}"] = torch.cat((renamed.pop(name), renamed.pop(f"{before}kv.{after}")))
    return renamed


class _Module:
    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return agent_first(params)

    @staticmethod
    def built(
        arguments: Mapping[str, Any], params: Mapping[str, Tensor], grid: tuple[int, int], **rest: Any
    ) -> tuple[AgentAttention, tuple[int, int]]:
        module = AgentAttention(
            arguments["dim"],
            heads=arguments.get("num_heads", 8),
            agents=int(arguments.get("agent_num", 49)),
            grid=grid,
            dropout=arguments.get("attn_drop", 0.0),
            **rest,
        )
        load(module, agent_first(params))
        return module.eval(), grid

    @staticmethod
    def run(module: tuple[AgentAttention, tuple[int, int]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        mechanism, grid = module
        return {"y": mechanism(inputs["x"], grid=grid)}


@official(_REPOSITORY, "agent_deit.py AgentAttention", ours=AgentAttention)
class DeiTAttention(_Module):
    """Tokens (B, 1 + N, C), the class token first."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> tuple[AgentAttention, tuple[int, int]]:
        window = arguments.get("window", 14)
        bias = arguments.get("qkv_bias", False)
        return _Module.built(arguments, params, (window, window), class_token=True, bias=bias)


@official(_REPOSITORY, "agent_swin.py AgentAttention")
class SwinAttention(_Module):
    """Windows (B·windows, N, C)."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> tuple[AgentAttention, tuple[int, int]]:
        height, width = arguments["window_size"]
        return _Module.built(arguments, params, (height, width), bias=arguments.get("qkv_bias", True))


@official(_REPOSITORY, "agent_pvt.py AgentAttention")
class PVTAttention(_Module):
    """Tokens (B, N, C) of a square map, keys and values from a coarser one."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> tuple[AgentAttention, tuple[int, int]]:
        side = int(arguments["num_patches"] ** 0.5)
        reduction, bias = arguments.get("sr_ratio", 1), arguments.get("qkv_bias", False)
        return _Module.built(arguments, params, (side, side), reduction=reduction, bias=bias)


@official(_REPOSITORY, "agent_deit.py VisionTransformer", ours=vision.AgentDeiT)
class AgentDeiT:
    """Images to logits."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return flat(agent_first(params, (*PLAIN, *MODULE)))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> vision.AgentDeiT:
        depth, deep = arguments.get("depth", 12), arguments.get("agent_layer", -1)
        stages = arguments.get("agent_num", (49, 49, 49, 49))
        stage_of_pair = (0, 1, 2, 2, 2, 3)
        deep = deep if deep > 0 else depth
        model = vision.AgentDeiT(
            dim=arguments.get("embed_dim", 768),
            depth=depth,
            heads=arguments.get("num_heads", 12),
            agents=[int(stages[stage_of_pair[layer // 2]]) for layer in range(deep)],
            agent_depth=deep,
            qkv_bias=arguments.get("qkv_bias", True),
            image=arguments.get("img_size", 224),
            patch=arguments.get("patch_size", 16),
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.0),
        )
        load(model, AgentDeiT.rename(params))
        return model

    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "AgentSwinTransformer", ours=vision.AgentSwin)
class AgentSwin:
    """Images to logits."""

    rules: tuple[Rule, ...] = (
        (r"^patch_embed\.proj\.", "stem.conv."),
        (r"^patch_embed\.norm\.", "stem.norm."),
        (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
        (r"^layers\.", "stages."),
        (r"\.attn\.", ".mixer."),
        (r"relative_position_bias_table$", "relative.table"),
        *MODULE,
    )

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        derived = ("relative_position_index", "attn_mask")
        return agent_first({n: t for n, t in params.items() if not n.endswith(derived)}, AgentSwin.rules)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> vision.AgentSwin:
        depths, image = arguments.get("depths", (2, 2, 6, 2)), arguments.get("img_size", 224)
        patch = arguments.get("patch_size", 4)
        window, kinds = arguments.get("window_size", 7), arguments.get("attn_type", "BBBB")
        leading = kinds[len(depths) :]
        agent_depths = [
            {"A": depth, "B": 0, "M": min(int(leading or 0), depth)}[kind]
            for depth, kind in zip(depths, kinds, strict=False)
        ]
        if any(agent_depths) and window < image // (patch * 2 ** min(i for i, d in enumerate(agent_depths) if d)):
            raise ValueError(f"window_size must cover the map of every stage with agents, got {window}")
        model = vision.AgentSwin(
            dim=arguments.get("embed_dim", 96),
            depths=depths,
            heads=arguments.get("num_heads", (3, 6, 12, 24)),
            agents=[int(n) for n in arguments.get("agent_num", (9, 16, 49, 49))],
            agent_depths=agent_depths,
            window=max(7, window // 8),
            patch=patch,
            image=image,
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            qkv_bias=arguments.get("qkv_bias", True),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.1),
        )
        load(model, AgentSwin.rename(params))
        return model

    run = AgentDeiT.run


@official(_REPOSITORY, "agent_pvt.py PyramidVisionTransformer", ours=vision.AgentPVT)
class AgentPVT:
    """Images to logits, for stages of type A."""

    rules: tuple[Rule, ...] = (
        (r"^patch_embed1\.proj\.", "stem.patches.conv."),
        (r"^patch_embed1\.norm\.", "stem.patches.norm."),
        (r"^pos_embed1$", "stem.positions.table"),
        (r"^patch_embed(\d+)\.proj\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.patches.conv."),
        (r"^patch_embed(\d+)\.norm\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.patches.norm."),
        (r"^pos_embed(\d+)$", lambda m: f"stages.{int(m[1]) - 1}.downsample.positions.table"),
        (r"^block(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
        (r"\.attn\.", ".mixer."),
        *MODULE,
    )

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed = agent_first(params, AgentPVT.rules)
        return {n: t.squeeze(0) if n.endswith("positions.table") else t for n, t in renamed.items()}

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> vision.AgentPVT:
        depths = arguments.get("depths", (3, 4, 6, 3))
        kinds = arguments.get("attn_type") or "AAAA"
        if set(kinds) != {"A"}:
            raise ValueError(f"attn_type must be agents in every stage (AAAA), got {kinds!r}")
        model = vision.AgentPVT(
            dims=arguments.get("embed_dims", (64, 128, 256, 512)),
            depths=depths,
            heads=arguments.get("num_heads", (1, 2, 4, 8)),
            mlp_ratios=arguments.get("mlp_ratios", (4, 4, 4, 4)),
            agents=[int(n) for n in arguments.get("agent_num", (9, 16, 49, 49))],
            key_reductions=[int(n) for n in str(arguments.get("agent_sr_ratios", "1" * len(depths)))],
            patch=arguments.get("patch_size", 16),
            image=arguments.get("img_size", 224),
            qkv_bias=arguments.get("qkv_bias", False),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            drop_path=arguments.get("drop_path_rate", 0.0),
        )
        load(model, AgentPVT.rename(params))
        return model

    run = AgentDeiT.run


def _in_their_order(merging: Merging) -> Merging:
    """Targets as the authors' argsort of equal keys leaves them: attention is blind to the order, a comparison not."""
    marks = torch.zeros(merging.order.shape[1] + len(merging.targets), dtype=torch.long)
    marks[merging.targets] = -1
    targets = marks.argsort()[: len(merging.targets)]
    rank = torch.empty_like(targets)
    rank[torch.searchsorted(merging.targets, targets)] = torch.arange(len(targets))
    return replace(merging, targets=targets, target=rank[merging.target])


@official(_REPOSITORY, "bipartite_soft_matching_random2d")
class TokenMerging:
    """Tokens to merged tokens, agents, and the merged ones put back."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> partial[Merging]:
        generator = None if arguments.get("no_rand", False) else torch.Generator().manual_seed(0)
        return partial(
            match,
            grid=(arguments["h"], arguments["w"]),
            cell=(arguments["sy"], arguments["sx"]),
            removed=arguments["r"],
            agents_removed=arguments["agent_r"],
            generator=generator,
        )

    @staticmethod
    def run(module: partial[Merging], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        merging = _in_their_order(module(inputs["x"]))
        merged, agents = merging.merge(inputs["x"])
        return {"merged": merged, "unmerged": merging.unmerge(merged)} | ({} if agents is None else {"agent": agents})


class Host(nn.Module):
    """The attention layer of a Stable Diffusion block, as `through_agents` wants it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.Linear(dim, dim)


@official(_REPOSITORY, "make_agent_attn")
class AgentLayer:
    """A host's attention on x (B, N, C) through agents (B, n, C); without few enough agents, plain attention."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> partial[Tensor]:
        host = Host(params["to_q.weight"].shape[1], arguments.get("heads", 8))
        load(host, params)
        rest = {"power": arguments.get("k_scale2", 0.3), "shortcut": arguments.get("k_shortcut", 0.075)}
        return partial(through_agents, host, **rest)

    @staticmethod
    def run(module: partial[Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"], inputs.get("agent"), inputs.get("context"))}
