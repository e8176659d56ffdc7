"""Dynamic-mask attention (arXiv 2508.02124): transformers' Doge, and the masks of SmallDoges/flash-dmattn."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.official.llama import attention, decoder, scaling
from attnlab.hub.renaming import Rule, rename
from attnlab.models.language.doge import Doge
from attnlab.nn.sparse.dynamic_mask import DynamicMask, positive_mask, top_indices, top_mask
from attnlab.positions import Rotary

PARTS: tuple[Rule, ...] = (
    (r"(^|\.)A$", r"\1rate"),
    (r"(^|\.)dt_proj\.", r"\1wdt."),
    (r"\.input_residual$", ".scale1"),
    (r"\.post_attention_residual$", ".scale2"),
    (r"\.router_gate\.", ".router."),
    (r"\.(down|up)_embed\.", r".\1."),
)


def layer(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of one attention layer under our names."""
    return attention(rename(params, PARTS))


def model(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole model's parameters under our names; a tied head is given its own entry."""
    return decoder(rename(params, PARTS))


def rope(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration says of the rotary position, in either layout."""
    given = arguments.get("rope_parameters") or {}
    base = given.get("rope_theta") or arguments.get("rope_theta") or 10000.0
    return {"base": base, "scaling": scaling(given or arguments.get("rope_scaling"))}


@official("huggingface/transformers", "DogeAttention", ours=DynamicMask)
class DogeAttention:
    """One layer's attention, causal, rotary (halves), the norms of q and k in it."""

    rename = staticmethod(layer)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> DynamicMask:
        dim, heads = arguments["hidden_size"], arguments["num_attention_heads"]
        head_dim = arguments.get("head_dim") or dim // heads
        module = DynamicMask(
            dim,
            heads=heads,
            kv_heads=arguments.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            keep=arguments.get("keep_window_size", 2048),
            variant="release",
            bias="q_proj.bias" in params,
            qk_norm=partial(nn.RMSNorm, eps=arguments.get("rms_norm_eps", 1e-6)),
            position=Rotary(head_dim, **rope(arguments)),
            dropout=arguments.get("attention_dropout") or 0.0,
        )
        module.load_state_dict(layer(params))
        return module

    @staticmethod
    def run(module: DynamicMask, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official("huggingface/transformers", "DogeForCausalLM", ours=Doge)
class DogeForCausalLM:
    """Token ids to logits; a mixture routes as the released code does."""

    rename = staticmethod(model)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Doge:
        if arguments.get("norm_topk_prob"):
            raise ValueError("norm_topk_prob must be False: a softmax over the chosen experts sums to one already")
        renamed = model(params)
        heads, dim = arguments["num_attention_heads"], arguments["hidden_size"]
        turned = rope(arguments)
        network = Doge(
            vocabulary=len(renamed["embedding.weight"]),
            dim=dim,
            depth=arguments["num_hidden_layers"],
            heads=heads,
            kv_heads=arguments.get("num_key_value_heads") or heads,
            head_dim=arguments.get("head_dim") or dim // heads,
            hidden=len(renamed["blocks.0.mlp.w1.weight"]),
            keep=arguments.get("keep_window_size", 2048),
            variant="release",
            experts=arguments.get("num_experts", 16384) if arguments.get("is_moe") else 0,
            active=arguments.get("num_experts_per_tok", 64),
            expert_variant="release",
            bias="blocks.0.mixer.wqkv.bias" in renamed,
            mlp_bias="blocks.0.mlp.w1.bias" in renamed,
            rope_base=turned["base"],
            rope_scaling=turned["scaling"],
            length=arguments.get("max_position_embeddings"),
            tied="lm_head.weight" not in params,
            norm_eps=arguments.get("rms_norm_eps", 1e-6),
            dropout=arguments.get("attention_dropout") or 0.0,
        )
        network.load_state_dict(renamed)
        return network.eval()

    @staticmethod
    def run(module: Doge, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = module(inputs["input_ids"])
        return {"logits": logits, "y": logits}


@official("SmallDoges/flash-dmattn", "topk_mask", "relu_mask", "block_smooth", "topk_indices")
class Masks:
    """The masks that the kernels take, causal."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> dict[str, int]:
        return {"keep": arguments["window_size"], "block": arguments.get("block_size") or 1}

    @staticmethod
    def run(module: dict[str, int], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        bias, keep, block = inputs["attention_bias"], module["keep"], module["block"]
        seen = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
        outputs = {
            "topk_mask": top_mask(bias, seen, keep),
            "topk_mask_block": top_mask(bias, seen, keep, block),
            "relu_mask": positive_mask(bias, seen),
            "relu_mask_block": positive_mask(bias, seen, block),
        }
        if "key_bias" in inputs:
            outputs["topk_indices"] = top_indices(inputs["key_bias"], keep)
        return outputs
