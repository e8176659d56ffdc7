"""sail-sg/Attention-Sink (arXiv 2410.10781): its attentions, its language models, its metric and its norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, rename
from attnlab.lens.measures.sinks import head_norms, hidden_norms, row_shares, sink_rate
from attnlab.models.language.sinks import CoarseRotary, SinkLM
from attnlab.nn.linear.kernel import KernelAttention
from attnlab.nn.multihead import MultiHead
from attnlab.nn.softmax.kv_bias import KVBias
from attnlab.nn.softmax.similarity import SimilarityAttention
from attnlab.positions import rotate

_REPOSITORY = "sail-sg/Attention-Sink"
_ATTENTION: tuple[Rule, ...] = (
    (r"(^|\.)attn\.(weight|bias)$", r"\1interleaved.\2"),
    (r"(^|\.)proj\.", r"\1wo."),
    (r"(^|\.)kernel_mlp(\d)\.", r"\1w\2."),
)
_MODEL: tuple[Rule, ...] = (
    (r"^transformer\.wte\.", "embedding."),
    (r"^transformer\.wpe\.weight$|^wpe\.weight$", "learned.table"),
    (r"^transformer\.ln_f\.", "norm."),
    (r"^lm_head\.", "head."),
    (r"^transformer\.h\.", "blocks."),
    (r"\.norm_(\d)\.", r".norm\1."),
    (r"\.mlp\.swiglu\.w1\.|\.mlp\.fc_1\.", ".mlp.w1."),
    (r"\.mlp\.swiglu\.w2\.|\.mlp\.fc_2\.", ".mlp.w3."),
    (r"\.mlp\.swiglu\.w3\.", ".mlp.w2."),
    (r"\.mlp\.fc\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.attn\.", r"\1.mixer."),
    (r"\.mixer\.attn\.", ".mixer.interleaved."),
    (r"\.mixer\.proj\.", ".mixer.wo."),
    (r"\.mixer\.kernel_mlp(\d)\.", r".mixer.w\1."),
)
_FFN = {
    "LLaMAMLP": "swiglu", "GegluMLP": "geglu", "RegluMLP": "reglu",
    "SwishMLP": "swish", "GeluMLP": "gelu", "GptNeoxMLP": "gelu", "ReluMLP": "relu",
}  # fmt: skip
_POSITION = {
    "rotary": "rotary", "absolute": "sinusoid", "learnable": "learned", "nope": "none",
    "relative": "relative", "alibi": "alibi",
}  # fmt: skip


def _read(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names; the projections stay as the authors lay out their rows, which `SinkLM` puts in order when it loads."""
    renamed = rename(params, _MODEL)
    gated = any(name.endswith(".mlp.w1.weight") for name in renamed)
    return {name.replace(".mlp.proj.", ".mlp.w2." if gated else ".mlp.fc2."): t for name, t in renamed.items()}


def _mixer(arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Our mechanism and its options, by the module of the authors' class and its configuration."""
    home = str(arguments["case_name"])
    normalise = bool(arguments.get("attention_normalize", True))
    if "kv_bias" in home or "kvbias" in home:
        key, value = bool(arguments.get("k_bias")), bool(arguments.get("v_bias"))
        return "kv_bias", dict(key=key, value=value, per_head=bool(arguments.get("head_bias")))
    if "attn_sim" in home or "attnsim" in home:
        return "similarity", dict(similarity=arguments.get("sim", "sigmoid"), normalise=normalise)
    if "attn_kernel" in home or "attnkernel" in home:
        return "kernel", dict(kernel=arguments.get("kernel", "linear"), normalise=normalise)
    return "multihead", {}


def _map(mixer: Any, x: Tensor, **keywords: Any) -> Tensor:
    """The map that the authors look at: shares of rows, with the slot as row and column 0 where there is one."""
    if isinstance(mixer, KVBias) and mixer.k_bias is not None:
        weights = pad(mixer.weights(x, slot=True, **keywords), (0, 0, 1, 0))
        weights[:, :, 0, 0] = 1.0  # the slot's own query sees nothing but the slot
        return weights
    weights = mixer.weights(x, **keywords)
    return weights if type(mixer) in (MultiHead, KVBias) else row_shares(weights)


class _Turn:
    """Rotary positions whose cosines and sines come with the input."""

    table: tuple[Tensor, Tensor]

    def __call__(self, q: Tensor, k: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        return rotate(q, *self.table), rotate(k, *self.table)


_CLASSES: dict[str, type[MultiHead]] = {
    "multihead": MultiHead, "kv_bias": KVBias, "similarity": SimilarityAttention, "kernel": KernelAttention,
}  # fmt: skip


@official(_REPOSITORY, "CausalSelfAttention")
class Attention:
    """Each of their attentions, of which the module's name says which it is."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> MultiHead:
        name, options = _mixer(arguments)
        heads, dim = arguments["n_head"], len(params["proj.weight"])
        groups = arguments.get("n_query_groups") or heads
        if groups != heads:
            options["kv_heads"] = groups
        module = _CLASSES[name](
            dim, heads=heads, causal=True, position=_Turn(), bias="proj.bias" in params, **options
        )  # fmt: skip
        renamed = rename(params, _ATTENTION)
        for kind in [n for n in renamed if n.startswith("interleaved.")]:
            rows = renamed.pop(kind).unflatten(0, (groups, -1, dim // heads))
            parts = (rows[:, :-2], rows[:, -2:-1], rows[:, -1:])
            renamed[kind.replace("interleaved", "wqkv")] = torch.cat([p.flatten(0, 2) for p in parts])
        module.load_state_dict(renamed)
        return module

    @staticmethod
    def run(module: MultiHead, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        turn: Any = module.position
        turn.table = inputs["cos"], inputs["sin"]
        return {"y": module(inputs["x"]), "attn": _map(module, inputs["x"])}


@official(
    _REPOSITORY, "GPT", "GPTkvbias", "GPTattnsim", "GPTattnkernel", "GPTpos", "GPTrelpos", "GPTprefix", "GPTwindow",
    "GPTpostln", ours=SinkLM,
)  # fmt: skip
class Model:
    """Token ids to logits, the maps of all layers, and the hidden states before and after each."""

    rename = staticmethod(_read)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> SinkLM:
        renamed = _read(params)
        name, options = _mixer(arguments)
        home = str(arguments["case_name"])
        for key, wanted in (("parallel_residual", False), ("shared_attention_norm", False)):
            if arguments.get(key, wanted) != wanted:
                raise ValueError(f"{key} must be {wanted}: these models have no other, got {arguments[key]}")
        if arguments.get("_norm_class", "RMSNorm") not in ("RMSNorm", "FusedRMSNorm"):
            raise ValueError(f"_norm_class must be RMSNorm or FusedRMSNorm, got {arguments['_norm_class']}")
        vocabulary, dim = renamed["embedding.weight"].shape
        heads = arguments["n_head"]
        position: Any = "rotary"
        if "pos" in home.rsplit(".", 1)[-1] and "postln" not in home:
            position = _POSITION[arguments.get("positional_embedding", "rotary")]
        share = arguments.get("rotary_percentage", 1.0)
        if position == "rotary" and share < 1:
            size = dim // heads
            position = CoarseRotary(size, dim=int(share * size), base=arguments.get("rope_base", 10000))
        model = SinkLM(
            vocabulary=vocabulary,
            dim=dim,
            depth=arguments["n_layer"],
            heads=heads,
            kv_heads=arguments.get("n_query_groups"),
            hidden=next(len(t) for n, t in renamed.items() if n.endswith((".mlp.w1.weight", ".mlp.fc1.weight"))),
            ffn=_FFN[arguments.get("_mlp_class", "GptNeoxMLP")],
            mixer=name,
            mixer_options=options,
            position=position,
            window=arguments.get("window_size") if "window" in home and arguments.get("window_size", -1) > 0 else None,
            prefix=arguments.get("prefix_token", 0) if "prefix" in home else 0,
            post_norm="postln" in home,
            bias="blocks.0.mixer.wo.bias" in renamed,
            variant="release",
            length=arguments.get("block_size"),
            rope_base=arguments.get("rope_base", 10000),
            norm_eps=arguments.get("norm_eps", 1e-5),
        )
        model.load_state_dict(renamed)
        return model.eval()

    @staticmethod
    def run(module: SinkLM, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = module.embedding(inputs["idx"])
        if module.learned is not None:
            x = module.learned(x)
        outputs = {"hidden0": x}
        for i, block in enumerate(module.blocks):
            held: Any = block
            seen = {} if held.pattern is None else {"pattern": held.pattern}
            outputs[f"attn{i}"] = _map(held.mixer, x if held.post_norm else held.norm1(x), **seen)
            x = block(x)
            outputs[f"hidden{i + 1}"] = x
        return {**outputs, "logits": module.head(module.norm(x))}


@official(_REPOSITORY, "compute_attention_sink")
class Metric:
    """Maps of all samples, layers and heads to the rate of sinks at each position."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda weights: sink_rate(weights, float(arguments.get("epsilon", 0.3)))

    @staticmethod
    def run(module: Callable[[Tensor], Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"metric_percent": module(inputs["attn"])}


@official(_REPOSITORY, "compute_norm", "compute_kv_norm")
class Norms:
    """Norms of hidden states, and of keys or values."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> None:
        return None

    @staticmethod
    def run(module: nn.Module | None, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        if "hidden" in inputs:
            found["hidden_norm"] = hidden_norms(inputs["hidden"])
        if "kv" in inputs:
            found["kv_norm"] = head_norms(inputs["kv"])
        return found
