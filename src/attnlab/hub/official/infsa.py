"""giorgioroffo/infinite-self-attention (arXiv 2603.00175): the function and the module, both forms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.official.vit import flat
from attnlab.hub.renaming import Rule, load
from attnlab.hub.renaming import rename as renamed_by
from attnlab.models.vision.infvit import InfViT
from attnlab.nn.linear.infinite import (
    InfiniteAttention,
    LinearInfiniteAttention,
    centrality,
    spectral_attention,
)
from attnlab.recipes.infinite import InTorch

_REPOSITORY = "giorgioroffo/infinite-self-attention"


def _linear(q: Tensor, k: Tensor, v: Tensor, rho: float) -> Tensor:
    return (rho * (centrality(q, k).unsqueeze(-2) @ v)).expand_as(v)


@official(_REPOSITORY, "infsa_attention")
class Functional:
    """q, k and v (B, H, N, D) to both forms' outputs; ρ stands in the arguments or in the call."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> dict[str, Any]:
        said = re.search(r"rho\s*=\s*([\d.]+)", arguments.get("call", ""))
        rho = float(arguments["rho"] if "rho" in arguments else said[1] if said else 0.95)
        return {"pure": partial(spectral_attention, rho=rho), "linear": partial(_linear, rho=rho)}

    @staticmethod
    def run(module: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: form(inputs["q"], inputs["k"], inputs["v"]) for name, form in module.items()}


@official(_REPOSITORY, "InfSAAttention", ours=InfiniteAttention)
class InfSAAttention:
    """Tokens x (B, N, C), or query, key and value, to (output, weights of each head)."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed = {n.replace("out_proj.", "wo."): t for n, t in params.items() if not re.match(r"[qkv]_proj\.", n)}
        for kind in ("weight", "bias"):
            if f"q_proj.{kind}" in params:
                renamed[f"wqkv.{kind}"] = torch.cat([params[f"{p}_proj.{kind}"] for p in "qkv"])
        return renamed

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> InTorch:
        dim = arguments["embed_dim"]
        for name in ("kdim", "vdim"):
            if arguments.get(name) not in (None, dim):
                raise ValueError(f"{name} must be embed_dim = {dim}, got {arguments[name]}")
        linear = arguments.get("variant", "pure_infsa") == "linear_infsa"
        module = (LinearInfiniteAttention if linear else InfiniteAttention)(
            dim,
            heads=arguments["num_heads"],
            bias=arguments.get("bias", True),
            dropout=arguments.get("dropout", 0.0),
        )
        module.load_state_dict(InfSAAttention.rename(params))
        return InTorch(module, arguments.get("batch_first", True)).eval()

    @staticmethod
    def run(module: InTorch, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        three = [inputs.get(name, inputs.get("x")) for name in ("query", "key", "value")]
        y, weights = module(*three, need_weights=True, average_attn_weights=False)
        if isinstance(module.inner, LinearInfiniteAttention):
            weights = weights[..., :1, :].mT  # one row for all: the authors return it once, as a column
        return {"y": y, "weights": weights}


_TORCHVISION: tuple[Rule, ...] = (
    (r"^conv_proj\.", "patches."),
    (r"^encoder\.pos_embedding$", "positions.table"),
    (r"^encoder\.ln\.", "encoder.norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"encoder.blocks.\1."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^heads\.head\.", "head."),
)


@official(_REPOSITORY, "VisionTransformer", ours=InfViT)
class ConvertedViT:
    """Images to logits: torchvision's vision transformer after the repository's `convert`, which is its InfViT."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        layers: dict[str, dict[str, Tensor]] = {}
        for name, tensor in renamed_by(params, _TORCHVISION).items():
            block, inside, rest = name.partition(".self_attention.")
            if inside:
                layers.setdefault(block, {})[rest] = tensor
            else:
                found[name] = tensor
        for block, attention in layers.items():
            found |= {f"{block}.mixer.{n}": t for n, t in InfSAAttention.rename(attention).items()}
        if any(name.startswith("heads.pre_logits.") for name in params):  # the dense layer before the head
            found = {re.sub(r"^head\.", "head.2.", n): t for n, t in found.items()}
            found = {n.replace("heads.pre_logits.", "head.0."): t for n, t in found.items()}
        return flat(found)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> InfViT:
        dim, channels, patch = params["conv_proj.weight"].shape[:3]
        model = InfViT(
            dim=dim,
            depth=arguments["num_layers"],
            heads=arguments["num_heads"],
            linear=arguments.get("variant", "pure_infsa") == "linear_infsa",
            image=arguments.get("image_size", 224),
            patch=patch,
            in_channels=channels,
            mlp_ratio=arguments["mlp_dim"] / dim,
            num_classes=len(params["heads.head.weight"]),
            dense="heads.pre_logits.weight" in params,
        )
        load(model, ConvertedViT.rename(params))
        return model.eval()

    @staticmethod
    def run(module: InfViT, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
