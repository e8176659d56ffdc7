"""zhoujiahuan1991/ICML2025-TCPA (arXiv 2505.02406): prompt pools around a frozen vision transformer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.official.vit import VisionTransformer
from attnlab.hub.renaming import load, rename
from attnlab.models.skeletons.plain import Plain
from attnlab.nn.multihead import MultiHead
from attnlab.recipes.tcpa import TCPA

_REPOSITORY = "zhoujiahuan1991/ICML2025-TCPA"


def _pools(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All but the backbone."""
    rules = (
        (r"^(?:Pool\.)?Pool_cls\.", "class_pool."),
        (r"^(?:Pool\.)?Pool_image\.", "patch_pool."),
        (r"^ADVP_w$", "value_scale"),
        (r"^ADVP_b$", "value_shift"),
        (r"^Prompter\.Prompter\.", "prompter."),
    )
    found = rename({n: p for n, p in params.items() if "ool" in n or n.startswith(("ADVP", "Prompter"))}, rules)
    return {n: p.flatten(0, -2) if n.startswith("value") else p for n, p in found.items()}


def _tune(backbone: Plain, arguments: Mapping[str, Any], params: Mapping[str, Tensor]) -> TCPA:
    if not arguments.get("RDVP", True):
        raise ValueError("RDVP must be True: without it the authors' networks have no prompts")
    if arguments.get("random_prompt"):
        raise ValueError("random_prompt must be False: noise on the tokens is not here")
    pools = _pools(params)
    return TCPA(
        backbone,
        size=(pools["class_pool.keys"].shape[1], pools["patch_pool.keys"].shape[1]),
        length=(pools["class_pool.prompts"].shape[2], pools["patch_pool.prompts"].shape[2]),
        keep=(arguments.get("topk_cls", 9), arguments.get("topk_image", 9)),
        select="token" if arguments.get("TDVP", True) else "role",
        dropout=arguments.get("prompt_dropout_dvp", 0.1),
        value_affine="value_scale" in pools,
        image_prompt=any(n.startswith("prompter") for n in pools),
        sharpen=arguments.get("simam", False),
    )


def _heads(arguments: Mapping[str, Any], dim: int) -> int:
    """The authors' heads are 64 wide; what is narrower than one has two."""
    return arguments.get("num_heads", dim // 64 if dim % 64 == 0 else 2)


class Layer(nn.Module):
    """One layer's matching and attention."""

    def __init__(self, tuned: TCPA, layer: int, heads: int) -> None:
        super().__init__()
        self.tuned, self.layer, self.heads = tuned, layer, heads

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        prompts = self.tuned.prompts(self.layer, len(x)).expand(len(x), -1, -1)
        seen, distance = self.tuned.match(x, self.layer)
        tokens = x.new_ones(*x.shape[:2], x.shape[1])
        shown = x.new_ones(*x.shape[:2], prompts.shape[1]) if seen is None else seen.to(x.dtype)
        mask = torch.cat((tokens[..., :1], shown, tokens[..., 1:]), -1)
        y = self.tuned.attention(x, self.layer, seen)
        mask = mask.unsqueeze(1).expand(-1, self.heads, -1, -1)
        return {"attn_out": y, "dist": distance, "mask": mask, "prompt_fourier": prompts}


@official(_REPOSITORY, "models.TCPA.Pool_TCPA + models.VFPT_TCPA.Model_VFPT_TCPA.forward_attn")
class TokenCoordinatedAttention:
    """The matching, the prompts and the attention of the layer that the call names."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Layer:
        layers, _, dim = params["Pool_cls.keys"].shape
        named = re.search(r"layer\s*=\s*(\d+)", arguments["call"])
        layer, heads = int(named[1]) if named else arguments.get("layer", 0), _heads(arguments, dim)
        inside = rename(
            {n: p for n, p in params.items() if n.startswith(("attn.", "norm1."))},
            ((r"^attn\.qkv\.", "mixer.wqkv."), (r"^attn\.proj\.", "mixer.wo.")),
        )
        backbone = Plain(
            dim=dim,
            depth=layers,
            mixer=lambda _: MultiHead(dim, heads=heads, bias="mixer.wqkv.bias" in inside, out_bias=True),
            image=1,
            patch=1,
            num_classes=1,
            norm=partial(nn.LayerNorm, eps=1e-6),
        )
        tuned = _tune(backbone, arguments, params)
        tuned.load_state_dict(_pools(params), strict=False)
        for name, p in inside.items():
            backbone.encoder.blocks[layer].get_parameter(name).data.copy_(p)
        return Layer(tuned, layer, heads)

    @staticmethod
    def run(module: Layer, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return module(inputs["x"])


@official(_REPOSITORY, "Model_VFPT_TCPA", ours=TCPA)
class TunedTransformer:
    """Images to logits and the distance."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inside = {n.removeprefix("backbone."): p for n, p in params.items() if n.startswith("backbone.")}
        return {**{f"backbone.{n}": p for n, p in VisionTransformer.rename(inside).items()}, **_pools(params)}

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> TCPA:
        inside = {n.removeprefix("backbone."): p for n, p in params.items() if n.startswith("backbone.")}
        patches = inside["patch_embed.proj.weight"]
        side = round((inside["pos_embed"].shape[1] - 1) ** 0.5)
        sizes = {
            "embed_dim": len(patches),
            "depth": 1 + max(int(n.split(".")[1]) for n in inside if n.startswith("blocks.")),
            "num_heads": _heads(arguments, len(patches)),
            "mlp_ratio": len(inside["blocks.0.mlp.fc1.weight"]) / len(patches),
            "img_size": side * patches.shape[-1],
            "patch_size": patches.shape[-1],
            "in_chans": patches.shape[1],
            "num_classes": len(inside["head.weight"]),
        }
        module = _tune(VisionTransformer.build(sizes, inside), arguments, params)
        load(module, TunedTransformer.rename(params))
        return module

    @staticmethod
    def run(module: TCPA, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        out = module.run(inputs["x"])
        return {"logits": out.logits, "y": out.logits, "y0": out.logits, "dist": out.distance, "y1": out.distance}
