"""Shark-NLP/CAB (arXiv 2210.07661): its library of attentions, and the script of its compositional index."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnlab.arena.bench.cab_index import METRICS, Metric, compositional_index
from attnlab.attend import attend
from attnlab.hub.official import official
from attnlab.hub.renaming import load
from attnlab.hub.renaming import rename as by_rules
from attnlab.nn.linear.bounded_memory import BoundedMemory
from attnlab.nn.linear.cosformer import CosFormer
from attnlab.nn.linear.diagonal_ssm import S4D
from attnlab.nn.linear.nystrom import NystromAttention
from attnlab.nn.linear.performer import Performer
from attnlab.nn.linear.randomized import RandomizedAttention
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.prob_sparse import ProbSparseAttention
from attnlab.nn.sparse.streaming_llm import SlidingWindow
from attnlab.nn.sparse.transformer_ls import WindowAndSummaries
from attnlab.patterns import Explicit, Pattern

_CAB = "Shark-NLP/CAB"
_RULES = (
    (r"\b(q)uery_projection\.|\b(k)ey_projection\.|\b(v)alue_projection\.|\bW_([qkv])\.", r"\1\2\3\4_proj."),
    (r"\b(out_proj|out_projection|W_o|output_linear)\.", "wo."),
    (r"\bcompress_(k|v)$", r"c\1"),
    (r"\beval_proj$", "projection"),
    (r"\bdual_ln_l\.", "near_norm."),
    (r"\bdual_ln_s\.", "far_norm."),
    (r"\bdconv_fc\.", "wp."),
    (r"\bkernel\.kernel\.C$", "reads"),
    (r"\bkernel\.kernel\.log_dt$", "step_log"),
    (r"\bkernel\.kernel\.log_w_real$", "decay_log"),
    (r"\bkernel\.kernel\.w_imag$", "turn"),
    (r"\bD$", "skip"),
)


# What ours have no counterpart for: the values that these arguments may have, if they are given.
_ONLY: dict[str, tuple[Any, ...]] = {
    "add_bias_kv": (), "add_zero_attn": (), "mix": (), "transposed": (), "postact": (), "d_keys": (), "d_values": (),
    "scale": (), "activation": ("gelu",), "act_fun": ("relu",), "proposal_gen": ("seg-means",), "head_dim": (),
}  # fmt: skip


def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names: q, k and v in one matrix."""
    named = by_rules(params, _RULES)
    for name in named:
        if re.search(r"\b(decay_log|turn)$", name):
            named[name] = named[name].squeeze(0)
    for name in [name for name in named if "q_proj." in name]:
        each = [named.pop(name.replace("q_proj.", f"{part}_proj.")) for part in "qkv"]
        named[name.replace("q_proj.", "wqkv.")] = torch.cat(each)
    return named


def _common(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What every class of the library has: width, heads and biases; ValueError for what we have not."""
    dim = arguments["embed_dim"]
    for name in ("kdim", "vdim"):
        if arguments.get(name) not in (None, dim):
            raise ValueError(f"{name} must be embed_dim = {dim}, got {arguments[name]}")
    for name, only in _ONLY.items():
        if arguments.get(name) not in (None, False, *only):
            raise ValueError(f"{name} must be left out, or one of {only}, got {arguments[name]!r}")
    return {"dim": dim, "heads": arguments["num_heads"], "bias": arguments.get("bias", True)}


def _filled(module: nn.Module, params: Mapping[str, Tensor]) -> Any:
    load(module, rename(params))
    return module


def _tokens(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Query, context (None in self-attention) and the keys that are real, of a call with batch_first=True.

    The library's `key_padding_mask` is true where a key is to be ignored. Its `query_padding_mask` does nothing.
    """
    key, value = inputs.get("key"), inputs.get("value")
    if value is not None and value is not key:
        if not torch.equal(value, inputs["query"] if key is None else key):
            raise ValueError("value must be key: ours are two projections of the same tokens")
    mask = inputs.get("key_padding_mask")
    return inputs["query"], key, None if mask is None else ~mask.bool()


def _shown(keep: Tensor | None, queries: int) -> Pattern | None:
    return None if keep is None else Explicit(keep[:, None, None, :].expand(-1, 1, queries, -1))


@official(_CAB, "compositional_index.py::get_ci")
class CompositionalIndex:
    """Totals of the four patterns, to four decimals as printed, for whichever μ, σ and signs are given."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> dict[str, tuple[Metric, ...]]:
        return METRICS

    @staticmethod
    def run(module: dict[str, tuple[Metric, ...]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        totals = []
        for i, metrics in enumerate(module.values()):
            columns = [inputs[f"{name}{i}"].tolist() for name in ("mu", "sigma", "sign") if f"{name}{i}" in inputs]
            if columns:
                metrics = tuple(
                    replace(m, mean=mean, deviation=deviation, sign=sign)
                    for m, mean, deviation, sign in zip(metrics, *columns, strict=True)
                )
            totals.append(compositional_index(metrics, inputs[f"raw{i}"].tolist()).total)
        return {"total": torch.tensor([round(t, 4) for t in totals if t is not None])}


@official(_CAB, "MultiheadAttention")
class Vanilla:
    """Softmax attention; what is causal is said by `attn_mask`, added to the scores, and not by `causal`."""

    rename = staticmethod(rename)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> MultiHead:
        return _filled(MultiHead(**_common(arguments)), params)

    @staticmethod
    def run(module: MultiHead, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x, context, keep = _tokens(inputs)
        mask = inputs.get("attn_mask")
        if mask is None:
            return {"y": module(x, context, pattern=_shown(keep, x.shape[1]))}
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask, -torch.inf)
        if mask.dim() == 3:
            mask = mask.unflatten(0, (-1, module.heads) if len(mask) > 1 else (1, 1))
        q, k, v = module.project(x, context)
        return {"y": module.merge(attend(q, k, v, bias=mask, pattern=_shown(keep, x.shape[1])))}


@official(_CAB, "LocalAttention")
class Local:
    """A window of `wsize` before, and as many behind where it is not causal: 2·wsize + 1 keys.

    Keys that are padding are never seen. The library hides only those of them that also lie outside the sequence.
    """

    rename = staticmethod(rename)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> SlidingWindow:
        causal = bool(arguments.get("causal", False))
        window = arguments.get("wsize", 15) + (not causal)
        return _filled(SlidingWindow(**_common(arguments), window=window, sinks=0, causal=causal), params)

    @staticmethod
    def run(module: SlidingWindow, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x, context, keep = _tokens(inputs)
        _self_attention(x, context)
        return {"y": module(x, pattern=_shown(keep, x.shape[1]))}


def _self_attention(x: Tensor, context: Tensor | None) -> None:
    if context is not None and not torch.equal(context, x):
        raise ValueError("key must be query: this method is self-attention")


class _Crossing:
    rename = staticmethod(rename)

    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x, context, keep = _tokens(inputs)
        return {"y": module(x, context, keep=keep)}


class _Alone:
    rename = staticmethod(rename)

    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x, context, keep = _tokens(inputs)
        _self_attention(x, context)
        return {"y": module(x, keep=keep)}


@official(_CAB, "ABC", ours=BoundedMemory)
class ABC(_Crossing):
    """The library's causal form, where it is not cross-attention: that is never causal."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> BoundedMemory:
        causal = bool(arguments.get("causal", False)) and not arguments.get("cross", False)
        slots = arguments.get("num_landmarks", 16)
        return _filled(BoundedMemory(**_common(arguments), slots=slots, variant="release", causal=causal), params)


@official(_CAB, "NystromAttention", ours=NystromAttention)
class Nystrom(_Alone):
    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> NystromAttention:
        module = NystromAttention(
            **_common(arguments),
            landmarks=arguments.get("num_landmarks", 16),
            conv=arguments.get("conv_kernel_size") or 0,
            variant="release",
        )
        return _filled(module, params)


@official(_CAB, "CosformerAttention", ours=CosFormer)
class Cosformer(_Crossing):
    """Not causal, as its constructor has it; its `length` is that of the call."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> CosFormer:
        if arguments.get("causal"):
            raise ValueError("causal=True is refused, as by the library's constructor")
        module = CosFormer(**_common(arguments))
        _filled(module, params)
        if not arguments.get("has_outproj", True):
            module.wo = nn.Identity()  # type: ignore[assignment]
        return module


@official(_CAB, "Performer", ours=Performer)
class PerformerLibrary(_Crossing):
    """The library's checkpoints do not hold its random features (`eval_proj`); without them others are drawn."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Performer:
        module = Performer(
            **_common(arguments), random_features=arguments.get("approx_attn_dim", 16), eps=1e-4, variant="release"
        )
        return _filled(module, {"eval_proj": module.projection, **params})


@official(_CAB, "Lara", ours=RandomizedAttention)
class Lara(_Alone):
    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> RandomizedAttention:
        return _filled(RandomizedAttention(**_common(arguments), landmarks=arguments.get("num_landmarks", 16)), params)


class _Seeded(NamedTuple):
    module: ProbSparseAttention
    seed: int


@official(_CAB, "ProbSparse", ours=ProbSparseAttention)
class ProbSparse:
    """Which keys each query is judged by is drawn as by torch after the seed that the call names, or after 0."""

    rename = staticmethod(rename)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> _Seeded:
        module = _filled(ProbSparseAttention(**_common(arguments), factor=arguments.get("factor") or 5), params)
        seed = re.search(r"manual_seed\((\d+)\)", arguments.get("call", ""))
        return _Seeded(module.eval(), int(seed[1]) if seed else 0)

    @staticmethod
    def run(module: _Seeded, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x, context, _ = _tokens(inputs)  # the library ignores padding here
        _self_attention(x, context)
        tokens = x.shape[1]
        rng = torch.Generator().manual_seed(module.seed)
        sample = torch.randint(tokens, (tokens, module.module.count(tokens)), generator=rng)
        return {"y": module.module(x, sample=sample)}


@official(_CAB, "S4D", ours=S4D)
class S4DLibrary:
    """Reads the query alone, and every token of it: padding masks do nothing."""

    rename = staticmethod(rename)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> S4D:
        module = S4D(
            _common({"num_heads": 1, **arguments})["dim"],
            states=arguments.get("d_state", 16),
            copies=arguments.get("num_heads", 1),
            causal=not arguments.get("bidirectional", False),
        )
        return _filled(module, params)

    @staticmethod
    def run(module: S4D, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["query"])}


@official(_CAB, "AttentionLS", ours=WindowAndSummaries)
class AttentionLS:
    """The long-short attention that is not causal; reads the query alone."""

    rename = staticmethod(rename)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> WindowAndSummaries:
        if arguments.get("conv_kernel_size", -1) > 0:
            raise ValueError("conv_kernel_size must be -1: the library's convolution cannot be called")
        module = WindowAndSummaries(
            **_common(arguments),
            window=arguments.get("window_size", 15),
            summaries=arguments.get("num_landmarks", 16),
        )
        return _filled(module, params)

    @staticmethod
    def run(module: WindowAndSummaries, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x, _, keep = _tokens(inputs)
        return {"y": module(x, keep=keep)}
