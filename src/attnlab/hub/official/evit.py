"""youweiliang/evit (arXiv 2202.07800): its block, its network, and its schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.official.vit import VisionTransformer
from attnlab.hub.renaming import load, rename
from attnlab.models.skeletons.plain import TokenBlock
from attnlab.models.vision.evit import EViT as Ours
from attnlab.models.vision.evit import run_block
from attnlab.nn.multihead import MultiHead
from attnlab.nn.tokens.reorganize import budget
from attnlab.recipes.evit import keep_rate

_REPOSITORY = "youweiliang/evit"


class Pruning(nn.Module):
    """A block that keeps a share of its patches."""

    def __init__(self, block: TokenBlock, rate: float, fuse: bool) -> None:
        super().__init__()
        self.block, self.rate, self.fuse = block, rate, fuse

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return run_block(self.block, x, budget(x.shape[1] - 1, self.rate), self.fuse)


@official(_REPOSITORY, "Block")
class Block:
    """Outputs are those of `get_idx=True`."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, [(r"^attn\.qkv\.", "mixer.wqkv."), (r"^attn\.proj\.", "mixer.wo.")])

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Pruning:
        dim = arguments["dim"]
        mixer = MultiHead(dim, heads=arguments["num_heads"], bias="attn.qkv.bias" in params, out_bias=True)
        block = TokenBlock(dim, mixer, mlp_ratio=len(params["mlp.fc1.bias"]) / dim)
        load(block, Block.rename(params))
        return Pruning(block, arguments.get("keep_rate", 1.0), arguments.get("fuse_token", False))

    @staticmethod
    def run(module: Pruning, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        y, places = module(inputs["x"])
        left = torch.tensor(y.shape[1] - 1)
        return {"y0": y, "y1": left, **({} if places is None else {"y2": places})}


@official(_REPOSITORY, "EViT", ours=Ours)
class EViT:
    """Images to logits. `keep_rate` has one entry per block, or one for all."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        second = [(r"^dist_token$", "distillation_token"), (r"^head_dist\.", "distillation_head.")]
        found = VisionTransformer.rename(rename(params, second))
        return {n: t.flatten() if n == "distillation_token" else t for n, t in found.items()}

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Ours:
        depth = arguments.get("depth", 12)
        rates = arguments.get("keep_rate", (1,))
        rates = tuple(rates) if isinstance(rates, (tuple, list)) else (rates,)
        rates = rates * depth if len(rates) == 1 else rates
        drop_at = [layer for layer, rate in enumerate(rates) if rate < 1]
        model = Ours(
            dim=arguments.get("embed_dim", 768),
            depth=depth,
            heads=arguments.get("num_heads", 12),
            qkv_bias=arguments.get("qkv_bias", True),
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            image=arguments.get("img_size", 224),
            patch=arguments.get("patch_size", 16),
            in_channels=arguments.get("in_chans", 3),
            num_classes=arguments.get("num_classes", 1000),
            norm=partial(nn.LayerNorm, eps=1e-6),
            drop_at=drop_at,
            keep=[rates[layer] for layer in drop_at],
            fuse=arguments.get("fuse_token", False),
            distilled="dist_token" in params,
        )
        load(model, EViT.rename(params))
        return model

    @staticmethod
    def run(module: Ours, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        out = module.encode(module.embed(inputs["x"])[0])
        kept = {f"idx{i}": places for i, places in enumerate(out.kept)}
        return {"logits": module.classify(out.tokens), **kept}


@official(_REPOSITORY, "adjust_keep_rate")
class AdjustKeepRate:
    """The schedule, in iterations."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Callable[[int], float]:
        epoch = arguments["ITERS_PER_EPOCH"]
        return partial(
            keep_rate,
            start=arguments["warmup_epochs"] * epoch,
            end=arguments["total_epochs"] * epoch,
            base=arguments.get("base_keep_rate", 0.5),
            top=arguments.get("max_keep_rate", 1),
        )

    @staticmethod
    def run(module: Callable[[int], float], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        rates = [module(step) for step in inputs["iters"].tolist()]
        return {"keep_rate": torch.tensor(rates, dtype=torch.float64)}
