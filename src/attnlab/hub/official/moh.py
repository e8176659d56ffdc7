"""SkyworkAI/MoH (arXiv 2410.11842): its attention in DiT, in LLaMA 3, and in TransNeXt."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official, transnext
from attnlab.hub.official.llama import scaling
from attnlab.hub.renaming import load, rename
from attnlab.models.diffusion.dit import DiT
from attnlab.models.vision.moh_vit import MoHViT
from attnlab.nn.softmax.mixture_of_heads import MixtureOfHeads
from attnlab.nn.spatial.aggregated import AggregatedAttention, CosineAttention
from attnlab.positions import Rotary


def router(params: Mapping[str, Tensor], prefix: str) -> Tensor:
    """The rows of W1, Wg and W0, as far as they are there."""
    return torch.cat([params[p] for n in ("wg_1", "wg", "wg_0") if (p := f"{prefix}{n}.weight") in params])


@official("SkyworkAI/MoH", "MoHAttention", ours=MixtureOfHeads)
class DiTAttention:
    """Fused q, k and v, and a head width that may differ from dim / heads."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return with_routers(params, lambda rest: rename(rest, [(r"^qkv\.", "wqkv."), (r"^proj\.", "wo.")]))

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


def _gates(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return dict(shared=arguments.get("shared_head", 0), routed=arguments.get("routed_head", 0))


def with_routers(params: Mapping[str, Tensor], rest: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> Any:
    """`rest` names all but the routers' weights, which become one matrix each."""
    parts = re.compile(r"(.*?)wg(_[01])?\.weight$")
    prefixes = sorted({m[1] for n in params if (m := parts.match(n))})
    renamed = rest({n: p for n, p in params.items() if not parts.match(n)})
    for prefix in prefixes:
        renamed.update(rest({f"{prefix}router.weight": router(params, prefix)}))
    return renamed


@official("SkyworkAI/MoH", "Attention", ours=CosineAttention)
class ViTAttention:
    """The last stage's. The places are given with each call."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return with_routers(params, transnext.Attention.rename)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> transnext.OnGrid:
        module = CosineAttention(
            len(params["proj.bias"]), **transnext.attention_options(arguments, params), **_gates(arguments)
        )
        load(module, ViTAttention.rename(params))
        return transnext.OnGrid(module, arguments["input_resolution"])

    run = staticmethod(transnext.Attention.run)


@official("SkyworkAI/MoH", "AggregatedAttention", ours=AggregatedAttention)
class ViTAggregated:
    """That of the first stages."""

    rename = staticmethod(ViTAttention.rename)
    run = staticmethod(ViTAttention.run)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> transnext.OnGrid:
        module = AggregatedAttention(
            len(params["proj.bias"]),
            **transnext.window_options(arguments),
            **transnext.attention_options(arguments, params),
            **_gates(arguments),
        )
        load(module, ViTAttention.rename(params))
        return transnext.OnGrid(module, arguments["input_resolution"])


_DIT = [
    (r"\bqkv\.", "wqkv."),
    (r"\battn\.proj\.", "attn.wo."),
    (r"\battn\.", "attention."),
    (r"adaLN_modulation\.1\.", "modulation."),
    (r"^x_embedder\.proj\.", "embedding."),
    (r"^t_embedder\.mlp\.0\.", "time.fc1."),
    (r"^t_embedder\.mlp\.2\.", "time.fc2."),
    (r"^y_embedder\.embedding_table\.", "label."),
    (r"^pos_embed$", "positions"),
    (r"^final_layer\.linear\.", "head."),
    (r"^final_layer\.", ""),
]


@official("SkyworkAI/MoH", "DiT", ours=DiT)
class WholeDiT:
    """`num_heads` may be a list, one for each block; only then does `head_dim` count."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return with_routers(params, lambda rest: rename(rest, _DIT))

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> DiT:
        heads, moh = arguments.get("num_heads", 16), arguments.get("moh", False)
        module = DiT(
            size=arguments.get("input_size", 32),
            patch=arguments.get("patch_size", 2),
            channels=arguments.get("in_channels", 4),
            dim=arguments.get("hidden_size", 1152),
            depth=arguments.get("depth", 28),
            heads=heads,
            head_dim=arguments.get("head_dim") if isinstance(heads, list) else None,
            shared=arguments.get("shared_head") if moh else None,
            routed=arguments.get("routed_head") if moh else None,
            mlp_ratio=arguments.get("mlp_ratio", 4.0),
            classes=arguments.get("num_classes", 1000),
            drop_class=arguments.get("class_dropout_prob", 0.1),
            variance=arguments.get("learn_sigma", True),
        )
        load(module, WholeDiT.rename(params))
        return module

    @staticmethod
    def run(module: DiT, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"], inputs["t"], inputs["y"])}


@official("SkyworkAI/MoH", "TransNeXt", ours=MoHViT)
class WholeViT:
    """Images to logits. Heads are counted per stage, and there is a router in every layer."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return with_routers(params, transnext.TransNeXt.rename)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> MoHViT:
        net = MoHViT(
            **transnext.network_options(arguments),
            shared=arguments.get("shared_head", (1, 2, 4, 8)),
            routed=arguments.get("routed_head", (0, 0, 0, 0)),
        )
        load(net, WholeViT.rename(params))
        return net

    run = staticmethod(transnext.TransNeXt.run)
