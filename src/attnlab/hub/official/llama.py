"""Decoders as transformers lays them out: Llama, Qwen3 and their relatives, with or without gates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, rename
from attnlab.models.skeletons.decoder import Decoder
from attnlab.positions import NTK, Linear, Llama3, Scaling, YaRN

LAYERS: tuple[Rule, ...] = (
    (r"^(model\.)?embed_tokens\.", "embedding."),
    (r"^(model\.)?layers\.", "blocks."),
    (r"^(model\.)?norm\.", "norm."),
    (r"^lm_head\.", "head."),
    (r"\.input_layernorm\.", ".norm1."),
    (r"\.post_attention_layernorm\.", ".norm2."),
    (r"\.self_attn\.", ".mixer."),
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"\.mlp\.up_proj\.", ".mlp.w3."),
    (r"\.mlp\.down_proj\.", ".mlp.w2."),
)


def attention(params: Mapping[str, Tensor], *, head_dim: int | None = None) -> dict[str, Tensor]:
    """Every `q_proj`, `k_proj`, `v_proj` as one `wqkv`, and `o_proj` as `wo`, at any depth of the names.

    Where `q_proj` is larger than the heads need it holds gates too, behind the queries of each key-value head: they
    become `wg`. `head_dim` is needed for gates per element where there is no norm of the queries to tell it.
    """
    renamed = {re.sub(r"(^|\.)o_proj\.", r"\1wo.", n): t for n, t in params.items()}
    for name in [n for n in renamed if re.search(r"(^|\.)q_proj\.weight$", n)]:
        home = name.removesuffix("q_proj.weight")
        width, rows = renamed[f"{home}wo.weight"].shape[1], len(renamed[name])
        norm = renamed.get(f"{home}q_norm.weight")
        known = head_dim if norm is None else len(norm)
        if known is None and rows - width not in (0, width):
            known = width // (rows - width)
        for kind in ("weight", "bias"):
            if f"{home}q_proj.{kind}" not in renamed:
                continue
            q, k, v = (renamed.pop(f"{home}{part}_proj.{kind}") for part in "qkv")
            if rows > width:
                if known is None:
                    raise ValueError("head_dim must be given: gates per element and no norm of the queries")
                groups = q.unflatten(0, (len(k) // known, -1))
                per_group = width // len(groups)
                q, gate = groups[:, :per_group].flatten(0, 1), groups[:, per_group:].flatten(0, 1)
                renamed[f"{home}wg.{kind}"] = gate
            renamed[f"{home}wqkv.{kind}"] = torch.cat((q, k, v))
    return renamed


def decoder(params: Mapping[str, Tensor], *, head_dim: int | None = None) -> dict[str, Tensor]:
    """A whole model's parameters under our names; a tied head is given its own entry."""
    kept = {n: t for n, t in params.items() if not n.endswith("rotary_emb.inv_freq")}
    renamed = attention(rename(kept, LAYERS), head_dim=head_dim)
    renamed.setdefault("head.weight", renamed["embedding.weight"])
    return renamed


def scaling(given: Mapping[str, Any] | None) -> Scaling | None:
    """The `rope_scaling` of a configuration."""
    if not given:
        return None
    kind, factor = given.get("rope_type", given.get("type", "default")), float(given.get("factor", 1.0))
    trained = given.get("original_max_position_embeddings", 4096)
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(factor)
    if kind == "ntk":
        return NTK(factor)
    if kind == "yarn":
        fast, slow = given.get("beta_fast") or 32.0, given.get("beta_slow") or 1.0
        return YaRN(factor, trained=trained, fast=fast, slow=slow, attention=given.get("attention_factor"))
    if kind == "llama3":
        return Llama3(factor, trained=trained, low=given["low_freq_factor"], high=given["high_freq_factor"])
    raise ValueError(f"rope_scaling {kind!r} is not known; there are default, linear, ntk, yarn, llama3")


@official("huggingface/transformers", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", ours=Decoder)
@official("qiuzh20/gated_attention", "Qwen3ForCausalLM")
class CausalLM:
    """Token ids to logits."""

    rename = staticmethod(decoder)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Decoder:
        renamed = decoder(params, head_dim=arguments.get("head_dim"))
        heads, dim = arguments["num_attention_heads"], arguments["hidden_size"]
        eps = arguments.get("rms_norm_eps", 1e-6)
        first = "blocks.0.mixer."
        options: dict[str, Any] = {"bias": f"{first}wqkv.bias" in renamed, "out_bias": f"{first}wo.bias" in renamed}
        if f"{first}q_norm.weight" in renamed:
            options["qk_norm"] = partial(nn.RMSNorm, eps=eps)
        gate = renamed.get(f"{first}wg.weight")
        if gate is not None:
            options["gate"] = "head" if len(gate) == heads else "element"
        model = Decoder(
            vocabulary=len(renamed["embedding.weight"]),
            dim=dim,
            depth=arguments["num_hidden_layers"],
            heads=heads,
            kv_heads=arguments.get("num_key_value_heads", heads),
            head_dim=arguments.get("head_dim") or dim // heads,
            hidden=len(renamed["blocks.0.mlp.w1.weight"]),
            mixer="multihead" if gate is None else "gated",
            mixer_options=options,
            rope_base=arguments.get("rope_theta", 10000.0),
            rope_scaling=scaling(arguments.get("rope_scaling")),
            length=arguments.get("max_position_embeddings"),
            tied="lm_head.weight" not in params,
            norm_eps=eps,
        )
        model.load_state_dict(renamed)
        return model.eval()

    @staticmethod
    def run(module: Decoder, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = module(inputs["input_ids"])
        return {"logits": logits, "y": logits}
