"""SkyworkAI/MoH (arXiv 2410.11842): its attention in DiT and in LLaMA 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.official.llama import scaling
from attnlab.hub.renaming import load
from attnlab.nn.softmax.mixture_of_heads import MixtureOfHeads
from attnlab.positions import Rotary


def router(params: Mapping[str, Tensor], prefix: str = "") -> Tensor:
    """The rows of W1, Wg and W0, as far as they are there."""
    return torch.cat([params[p] for n in ("wg_1", "wg", "wg_0") if (p := f"{prefix}{n}.weight") in params])


@official("SkyworkAI/MoH", "MoHAttention", ours=MixtureOfHeads)
class DiTAttention:
    """Fused q, k and v, and a head width that may differ from dim / heads."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {n: p for n, p in params.items() if not n.startswith("wg")}
        names = {n: n.replace("qkv.", "wqkv.").replace("proj.", "wo.") for n in kept}
        return {**{names[n]: p for n, p in kept.items()}, "router.weight": router(params)}

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> MixtureOfHeads:
        module = MixtureOfHeads(
            arguments["dim"],
            heads=arguments.get("num_heads", 8),
            head_dim=arguments.get("head_dim"),
            shared=arguments.get("shared_head", 0),
            routed=arguments.get("routed_head", 0),
            bias="qkv.bias" in params,
            out_bias=True,
            qk_norm=nn.LayerNorm if "q_norm.weight" in params else None,
            dropout=arguments.get("attn_drop", 0.0),
        )
        load(module, DiTAttention.rename(params))
        return module

    @staticmethod
    def run(module: MixtureOfHeads, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        outputs = {"y": module(x)}
        if module.router is not None and module.routed:
            outputs["l_aux"] = module.router.balance(x).view(1)
        return outputs


@official("SkyworkAI/MoH", "LlamaAttention", "LlamaSdpaAttention", "LlamaFlashAttention2")
class LlamaAttention:
    """No router: half of the heads are shared, and a quarter is taken by the length of the query."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed = {"wo.weight": params["o_proj.weight"]}
        for end in ("weight", "bias"):
            if f"q_proj.{end}" in params:
                renamed[f"wqkv.{end}"] = torch.cat([params[f"{n}_proj.{end}"] for n in "qkv"])
        if "o_proj.bias" in params:
            renamed["wo.bias"] = params["o_proj.bias"]
        return renamed

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> MixtureOfHeads:
        heads = arguments.get("num_attention_heads") or arguments["heads"]
        width, dim = params["q_proj.weight"].shape
        head_dim = width // heads
        position = None
        if "RoPE replaced by identity" not in arguments["text"]:
            base = arguments.get("rope_theta", 10000.0)
            position = Rotary(head_dim, base=base, scaling=scaling(arguments.get("rope_scaling")))
        module = MixtureOfHeads(
            dim,
            heads=heads,
            kv_heads=len(params["k_proj.weight"]) // head_dim,
            head_dim=head_dim,
            shared=int(heads * 0.5),
            routed=int(heads * 0.25),
            select="query_norm",
            bias="q_proj.bias" in params,
            causal=True,
            position=position,
        )
        load(module, LlamaAttention.rename(params))
        return module

    @staticmethod
    def run(module: MixtureOfHeads, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
