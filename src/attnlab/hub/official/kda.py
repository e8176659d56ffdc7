"""Kimi Linear (arXiv 2510.26692): transformers' layers and network, and the operators and layer of fla."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.language.kimi import KimiLinear
from attnlab.nn.channel.moe import MoE
from attnlab.nn.linear.kda import KimiDeltaAttention, log_decay
from attnlab.nn.softmax.mla import LatentAttention
from attnlab.scan import scan

_FLA, _TRANSFORMERS = "fla-org/flash-linear-attention", "huggingface/transformers"

_KDA: tuple[Rule, ...] = (
    (r"forget_gate\.", ""),
    (r"(^|\.)f_a_proj\.", r"\1decay.0."),
    (r"(^|\.)f_b_proj\.", r"\1decay.1."),
    (r"(^|\.)f_proj\.", r"\1decay."),
    (r"(^|\.)g_a_proj\.", r"\1gate.0."),
    (r"(^|\.)g_b_proj\.", r"\1gate.1."),
    (r"(^|\.)g_proj\.", r"\1gate."),
    (r"(^|\.)b_proj\.", r"\1wbeta."),
    (r"(^|\.)A_log$", r"\1a_log"),
    (r"(^|\.)conv1d\.", r"\1conv."),
    (r"(^|\.)o_norm\.", r"\1norm."),
    (r"(^|\.)o_proj\.", r"\1wo."),
)
_MLA: tuple[Rule, ...] = (
    (r"(^|\.)q_proj\.", r"\1wq."),
    (r"(^|\.)kv_a_proj_with_mqa\.", r"\1wdown."),
    (r"(^|\.)kv_a_layernorm\.", r"\1norm."),
    (r"(^|\.)kv_b_proj\.", r"\1wup."),
    (r"(^|\.)o_proj\.", r"\1wo."),
)
_MOE: tuple[Rule, ...] = (
    (r"(^|\.)gate\.weight$", r"\1router.weight"),
    (r"(^|\.)gate\.e_score_correction_bias$", r"\1router.bias"),
    (r"experts\.gate_up_proj$", "experts.w13"),
    (r"experts\.down_proj$", "experts.w2"),
)
_NETWORK: tuple[Rule, ...] = (
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embedding."),
    (r"^lm_head\.", "head."),
    (r"^layers\.", "blocks."),
    (r"\.input_layernorm\.", ".norm1."),
    (r"\.post_attention_layernorm\.", ".norm2."),
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"\.mlp\.up_proj\.", ".mlp.w3."),
    (r"\.mlp\.down_proj\.", ".mlp.w2."),
    (r"\.self_attn\.", ".mixer."),
)


def _join(params: dict[str, Tensor], parts: tuple[str, ...], whole: str) -> None:
    """Replace the `parts` (names' ends, with the same prefix) by their concatenation along the rows, as `whole`."""
    for name in [n for n in params if n == parts[0] or n.endswith("." + parts[0])]:
        prefix = name.removesuffix(parts[0])
        params[prefix + whole] = torch.cat([params.pop(prefix + part) for part in parts])


def _rename_kda(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers convolves q, k and v together, fla each by itself; ours is one table of filters."""
    found = dict(params)
    _join(found, ("q_proj.weight", "k_proj.weight", "v_proj.weight"), "wqkv.weight")
    for kind in ("weight", "bias"):
        _join(found, tuple(f"{x}_conv1d.{kind}" for x in "qkv"), f"conv1d.{kind}")
    found = rename(found, _KDA)
    for name, tensor in found.items():
        if name.endswith("conv.weight"):
            found[name] = tensor.flatten(1)
        if name.endswith("a_log"):
            found[name] = tensor.flatten()
    return found


def _stack_experts(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released checkpoint holds each expert by itself, as experts.N.w1, w2, w3; transformers stacks them."""
    found, numbers = {}, dict[str, int]()
    for name, tensor in params.items():
        expert = re.fullmatch(r"(.*experts)\.(\d+)\.w[123]\.weight", name)
        if expert is None:
            found[name] = tensor
        else:
            numbers[expert[1]] = max(numbers.get(expert[1], 0), int(expert[2]) + 1)
    for prefix, count in numbers.items():
        w1, w2, w3 = ([params[f"{prefix}.{n}.{w}.weight"] for n in range(count)] for w in ("w1", "w2", "w3"))
        found[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(w1, w3, strict=True)])
        found[f"{prefix}.down_proj"] = torch.stack(w2)
    return found


def _rename_moe(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = _stack_experts({n.replace("block_sparse_moe.", "mlp."): t for n, t in params.items()})
    _join(found, ("shared_experts.gate_proj.weight", "shared_experts.up_proj.weight"), "shared.w13")
    _join(found, ("shared_experts.down_proj.weight",), "shared.w2")
    for name in [n for n in found if "shared.w" in n]:
        found[name] = found[name].unsqueeze(0)
    return rename(found, _MOE)


def _argument(arguments: Mapping[str, Any], *names: str, default: Any) -> Any:
    """The first of the given arguments: configurations have had several names for the same thing."""
    return next((arguments[n] for n in names if arguments.get(n) is not None), default)


@official(_FLA, "naive_recurrent_kda", "naive_chunk_kda", "chunk_kda", "fused_recurrent_kda")
class KDAOperator:
    """q, k `(B, T, H, K)`, v `(B, T, HV, V)`, g `(B, T, HV, K)`, beta `(B, T, HV)`: o, o_chunk and the last state."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        chunk = arguments.get("chunk_size", 64)
        given = arguments.get("scale")

        def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            q, k, v, g, beta = (inputs[n].transpose(1, 2) for n in ("q", "k", "v", "g", "beta"))
            scale = given if isinstance(given, (int, float)) else q.shape[-1] ** -0.5
            call = partial(
                scan, q, k, v, decay=g, beta=beta, scale=scale, state=inputs.get("initial_state"), chunk=chunk
            )
            o, last = call(backend="recurrent")
            o_chunk, _ = call(backend="chunked")
            return {"o": o.transpose(1, 2), "o_chunk": o_chunk.transpose(1, 2), "state": last}

        return run

    @staticmethod
    def run(module: Callable[[dict[str, Tensor]], dict[str, Tensor]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return module(inputs)


@official(_FLA, "naive_kda_gate", "naive_kda_lowerbound_gate")
class KDAGate:
    """g `(…, H, K)`, A_log, dt_bias: the logarithm of the decay, free and bounded."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> float:
        return float(arguments.get("lower_bound", -5.0))

    @staticmethod
    def run(module: float, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        f, a_log, bias = inputs["g"], inputs.get("A_log"), inputs.get("dt_bias")
        rate = f.new_zeros(f.shape[-2]) if a_log is None else a_log
        found = {"gate": log_decay(f, rate, bias), "lower": log_decay(f, rate, bias, module)}
        return {**found, "y": found["lower"] if a_log is None else found["gate"]}


@official(_TRANSFORMERS, "KimiLinearDeltaAttention", ours=KimiDeltaAttention)
class TransformersKDA:
    """Tokens `(B, T, C)`; both linear layers of the output gate without bias."""

    rename = staticmethod(_rename_kda)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> KimiDeltaAttention:
        heads = _argument(
            arguments, "linear_num_heads", "linear_num_key_heads", default=params["b_proj.weight"].shape[0]
        )
        module = KimiDeltaAttention(
            params["o_proj.weight"].shape[0],
            heads=heads,
            head_dim=params["q_proj.weight"].shape[0] // heads,
            value_dim=params["v_proj.weight"].shape[0] // heads,
            conv=params["conv1d.weight"].shape[-1],
            conv_bias="conv1d.bias" in params,
            rank=params["forget_gate.f_a_proj.weight"].shape[0],
            gate_bias="g_b_proj.bias" in params,
            lower_bound=_argument(arguments, "gate_lower_bound", "lower_bound", default=None),
            norm_eps=_argument(arguments, "rms_norm_eps", default=1e-5),
        )
        load(module, _rename_kda(params))
        return module

    @staticmethod
    def run(module: KimiDeltaAttention, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_FLA, "KimiDeltaAttention")
class FlaKDA:
    """Tokens `(B, T, C)`; the output gate's second linear layer has a bias, and value heads may outnumber key heads."""

    rename = staticmethod(_rename_kda)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> KimiDeltaAttention:
        heads = params["b_proj.weight"].shape[0]
        head_dim = params["dt_bias"].numel() // heads
        convolved = "q_conv1d.weight" in params
        module = KimiDeltaAttention(
            params["o_proj.weight"].shape[0],
            heads=heads,
            head_dim=head_dim,
            key_heads=params["q_proj.weight"].shape[0] // head_dim,
            value_dim=params["v_proj.weight"].shape[0] // heads,
            conv=params["q_conv1d.weight"].shape[-1] if convolved else None,
            conv_bias="q_conv1d.bias" in params,
            rank=params["f_proj.0.weight"].shape[0],
            gate_bias="g_proj.1.bias" in params,
            negative_eigenvalues=arguments.get("allow_neg_eigval", False),
            lower_bound=arguments.get("lower_bound"),
            norm_eps=arguments.get("norm_eps", 1e-5),
        )
        load(module, _rename_kda(params))
        return module

    run = TransformersKDA.run


def _numbers_in_words(text: str) -> dict[str, Any]:
    """The numbers of a sentence such as "heads 2, nope 6, top2", each under the word that it follows."""
    return {word: ast.literal_eval(number) for word, number in re.findall(r"([a-z_]+)\s*(\d+(?:\.\d+)?)\b", text)}


@official(_TRANSFORMERS, "KimiLinearAttention", ours=LatentAttention)
class TransformersMLA:
    """Tokens `(B, T, C)`, causal."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(params, _MLA)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> LatentAttention:
        given = {**_numbers_in_words(arguments.get("text", "")), **arguments}
        heads = _argument(given, "num_attention_heads", "num_heads", "heads", default=None)
        if heads is None:
            raise ValueError("arguments of KimiLinearAttention must give num_attention_heads")
        rank = params["kv_a_layernorm.weight"].shape[0]
        shared_dim = params["kv_a_proj_with_mqa.weight"].shape[0] - rank
        module = LatentAttention(
            params["o_proj.weight"].shape[0],
            heads=heads,
            head_dim=params["q_proj.weight"].shape[0] // heads - shared_dim,
            shared_dim=shared_dim,
            value_dim=params["o_proj.weight"].shape[1] // heads,
            rank=rank,
            causal=True,
        )
        load(module, TransformersMLA.rename(params))
        return module

    @staticmethod
    def run(module: LatentAttention, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_TRANSFORMERS, "KimiLinearMoE", ours=MoE)
class TransformersMoE:
    """Tokens `(B, T, C)`; a shared expert beside the routed ones."""

    rename = staticmethod(_rename_moe)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> MoE:
        given = {**_numbers_in_words(arguments.get("text", "")), **arguments}
        found = _rename_moe(params)
        experts, dim, hidden = found["experts.w2"].shape
        module = MoE(
            dim,
            hidden,
            experts=experts,
            active=_argument(given, "num_experts_per_token", "num_experts_per_tok", "top_k", "top", default=8),
            shared=found["shared.w2"].shape[-1] // hidden if "shared.w2" in found else 0,
            **_routing(given),
        )
        load(module, found)
        return module

    @staticmethod
    def run(module: MoE, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


def _routing(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return dict(
        scaling=_argument(arguments, "routed_scaling_factor", "routed_scaling", default=2.446),
        normalise=_argument(arguments, "moe_renormalize", "norm_topk_prob", default=True),
        groups=_argument(arguments, "num_expert_group", "n_group", default=1),
        active_groups=_argument(arguments, "topk_group", default=1),
    )


@official(_TRANSFORMERS, "KimiLinearForCausalLM", ours=KimiLinear)
class TransformersKimiLinear:
    """Token ids `(B, T)` to logits; reads checkpoints as transformers names them and as the authors released them."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        full = {n.split(".self_attn.")[0] for n in params if "kv_a_proj_with_mqa" in n}
        mla = {n: t for n, t in params.items() if ".self_attn." in n and n.split(".self_attn.")[0] in full}
        kda = {n: t for n, t in params.items() if ".self_attn." in n and n not in mla}
        rest = {n: t for n, t in params.items() if ".self_attn." not in n}
        found = {**rename(mla, _MLA), **_rename_kda(kda), **_rename_moe(rest)}
        return rename(found, _NETWORK)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> KimiLinear:
        depth = arguments["num_hidden_layers"]
        kinds = arguments.get("layer_types")
        feed_forwards = arguments.get("mlp_layer_types")
        module = KimiLinear(
            vocabulary=arguments["vocab_size"],
            dim=arguments["hidden_size"],
            depth=depth,
            heads=arguments["num_attention_heads"],
            head_dim=arguments["qk_nope_head_dim"],
            full=None if kinds is None else [i for i, kind in enumerate(kinds) if kind == "full_attention"],
            rank=arguments["kv_lora_rank"],
            shared_dim=arguments["qk_rope_head_dim"],
            value_dim=arguments["v_head_dim"],
            kda_heads=_argument(arguments, "linear_num_heads", "linear_num_key_heads", default=None),
            kda_head_dim=_argument(arguments, "linear_head_dim", "linear_key_head_dim", default=None),
            conv=arguments.get("linear_conv_kernel_dim", 4),
            hidden=_argument(arguments, "dense_ffn_hidden", "intermediate_size", default=None),
            dense=feed_forwards.count("dense") if feed_forwards else arguments.get("first_k_dense_replace", 1),
            experts=_argument(arguments, "num_experts", "num_local_experts", "n_routed_experts", default=None),
            active=_argument(arguments, "num_experts_per_token", "num_experts_per_tok", default=8),
            expert_hidden=arguments["moe_intermediate_size"],
            shared_experts=_argument(arguments, "num_shared_experts", "n_shared_experts", default=1),
            norm_eps=arguments.get("rms_norm_eps", 1e-5),
            tied=arguments.get("tie_word_embeddings", False),
            **_routing(arguments),
        )
        load(module, TransformersKimiLinear.rename(params))
        return module

    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["input_ids"])}
