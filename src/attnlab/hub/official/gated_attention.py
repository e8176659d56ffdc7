"""qiuzh20/gated_attention (arXiv 2505.06708): the attention of its Qwen3 models. The whole models: `llama`."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.official.llama import attention, scaling
from attnlab.nn.softmax.gated import GatedAttention
from attnlab.positions import Rotary


@official(
    "qiuzh20/gated_attention", "Qwen3Attention", "Qwen3SdpaAttention", "Qwen3FlashAttention2", ours=GatedAttention
)
class Qwen3Attention:
    """Causal, rotary (halves), a norm of q and k per head; the gates lie inside `q_proj`."""

    rename = staticmethod(attention)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> GatedAttention:
        dim, heads = arguments["hidden_size"], arguments["num_attention_heads"]
        head_dim = arguments.get("head_dim") or dim // heads
        gate: Literal["head", "element"] | None = None
        if arguments.get("headwise_attn_output_gate"):
            gate = "head"
        elif arguments.get("elementwise_attn_output_gate"):
            gate = "element"
        module = GatedAttention(
            dim,
            heads=heads,
            kv_heads=arguments.get("num_key_value_heads", heads),
            head_dim=head_dim,
            gate=gate,
            bias=bool(arguments.get("qkv_bias", False)),
            qk_norm=partial(nn.RMSNorm, eps=arguments.get("rms_norm_eps", 1e-6)) if "q_norm.weight" in params else None,
            position=Rotary(
                head_dim, base=arguments.get("rope_theta", 10000.0), scaling=scaling(arguments.get("rope_scaling"))
            ),
            dropout=arguments.get("attention_dropout", 0.0),
            causal=True,
        )
        module.load_state_dict(attention(params, head_dim=head_dim))
        return module

    @staticmethod
    def run(module: GatedAttention, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
