"""Shark-NLP/CAB (arXiv 2210.07661): its library of attentions, and the script of its compositional index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.arena.bench.cab_index import METRICS, Metric, compositional_index
from attnlab.attend import attend
from attnlab.hub.official import official
from attnlab.hub.renaming import load
from attnlab.hub.renaming import rename as by_rules
from attnlab.nn.linear.bounded_memory import BoundedMemory
from attnlab.nn.linear.cosformer import CosFormer
from attnlab.nn.linear.nystrom import NystromAttention
from attnlab.nn.linear.performer import Performer
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.streaming_llm import SlidingWindow
from attnlab.patterns import Explicit, Pattern

_CAB = "Shark-NLP/CAB"
_RULES = ((r"out_proj\.", "wo."), (r"\bcompress_(k|v)$", r"c\1"), (r"\beval_proj$", "projection"))


def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names: q, k and v in one matrix."""
    named = by_rules(params, _RULES)
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
    for name in ("add_bias_kv", "add_zero_attn", "mix", "transposed"):
        if arguments.get(name):
            raise ValueError(f"{name}=True is not served")
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
        if arguments.get("act_fun", "relu") != "relu":
            raise ValueError(f"act_fun must be 'relu': the library's {arguments['act_fun']!r} cannot be called")
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
            **_common(arguments), random_features=arguments.get("approx_attn_dim", 16), variant="release"
        )
        return _filled(module, {"eval_proj": module.projection, **params})
