"""SkyworkAI/MoH (arXiv 2410.11842): its attention in DiT, in LLaMA 3, and in TransNeXt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.official.llama import scaling
from attnlab.hub.renaming import load, rename
from attnlab.models.diffusion.dit import DiT
from attnlab.nn.softmax.mixture_of_heads import MixtureOfHeads
from attnlab.nn.spatial.aggregated import AggregatedAttention, CosineAttention
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


_PLACES = [
    (r"^qkv\.", "wqkv."),
    (r"^proj\.", "wo."),
    (r"^sr\.", "reduce."),
    (r"^learnable_tokens$", "window_tokens"),
    (r"^learnable_bias$", "window_shift"),
    (r"^relative_pos_bias_local$", "window_bias"),
]


class OnGrid(nn.Module):
    """The attention on the grid that the authors' constructor was given, with places as their models hand them over."""

    def __init__(self, attention: CosineAttention, grid: Sequence[int]) -> None:
        super().__init__()
        self.attention, self.grid = attention, tuple(grid)

    def forward(self, x: Tensor, index: Tensor, table: Tensor) -> Tensor:
        return self.attention(x, grid=self.grid, places=(index.flatten(), table))


def _grid_options(arguments: dict[str, Any], params: Mapping[str, Tensor]) -> dict[str, Any]:
    return dict(
        heads=len(params["temperature"]),
        bias="qkv.bias" in params or "q.bias" in params,
        shared=arguments.get("shared_head", 0),
        routed=arguments.get("routed_head", 0),
        dropout=arguments.get("attn_drop", 0.0),
    )


@official("SkyworkAI/MoH", "Attention", ours=CosineAttention)
class ViTAttention:
    """The last stage's. The places are given with each call."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        params = dict(params)
        gates = router(params)
        if "q.weight" in params:
            for end in ("weight", "bias"):
                if f"q.{end}" in params:
                    params[f"qkv.{end}"] = torch.cat((params.pop(f"q.{end}"), params.pop(f"kv.{end}")))
            params["sr.weight"] = params["sr.weight"].flatten(1)  # a convolution of one place
        buffers = ("wg", "seq_length_scale", "padding_mask")
        kept = {n: p for n, p in params.items() if not n.startswith(buffers)}
        return {**rename(kept, _PLACES), "router.weight": gates}

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> OnGrid:
        module = CosineAttention(len(params["proj.bias"]), **_grid_options(arguments, params))
        load(module, ViTAttention.rename(params))
        return OnGrid(module, arguments["input_resolution"])

    @staticmethod
    def run(module: OnGrid, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"], inputs["relative_pos_index"], inputs["relative_coords_table"])}


@official("SkyworkAI/MoH", "AggregatedAttention", ours=AggregatedAttention)
class ViTAggregated:
    """That of the first stages."""

    rename = staticmethod(ViTAttention.rename)
    run = staticmethod(ViTAttention.run)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> OnGrid:
        module = AggregatedAttention(
            len(params["proj.bias"]),
            window=arguments.get("window_size", 3),
            ratio=arguments.get("sr_ratio", 1),
            pool=arguments.get("fixed_pool_size"),
            **_grid_options(arguments, params),
        )
        load(module, ViTAttention.rename(params))
        return OnGrid(module, arguments["input_resolution"])


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
        gates = {}
        for prefix in sorted({n.split("wg")[0] for n in params if ".wg" in n}):
            gates[f"{prefix.replace('attn.', 'attention.')}router.weight"] = router(params, prefix)
        return {**rename({n: p for n, p in params.items() if ".wg" not in n}, _DIT), **gates}

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
