"""Mamba and Mamba-2 (arXiv 2312.00752, 2405.21060): transformers' layers and networks, and the authors' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.language.mamba import MambaLM
from attnlab.nn.linear.selective import Mamba, Mamba2

_LAYER: tuple[Rule, ...] = (
    (r"(^|\.)in_proj\.", r"\1wi."),
    (r"(^|\.)conv1d\.", r"\1conv."),
    (r"(^|\.)x_proj\.", r"\1wx."),
    (r"(^|\.)dt_proj\.", r"\1wdelta."),
    (r"(^|\.)dt_bias$", r"\1bias"),
    (r"(^|\.)A_log$", r"\1a_log"),
    (r"(^|\.)D$", r"\1skip"),
    (r"(^|mixer\.)norm\.weight$", r"\1norm"),
    (r"(^|\.)out_proj\.", r"\1wo."),
)
_NETWORK: tuple[Rule, ...] = (
    (r"^backbone\.embeddings?\.", "embedding."),
    (r"^backbone\.layers\.(\d+)\.norm\.", r"blocks.\1.norm1."),
    (r"^backbone\.layers\.", "blocks."),
    (r"^backbone\.norm_f\.", "final_norm."),  # later "norm.", which the layers' rules would take for a mixer's
    (r"^lm_head\.", "head."),
)


def layer(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of an official mixer by our names; a convolution's lose their middle axis of 1."""
    return {n: t.squeeze(1) if n.endswith("conv.weight") else t for n, t in rename(params, _LAYER).items()}


def network(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of an official language model by our names; a tied head may be left out."""
    ours = layer(rename(params, _NETWORK))
    ours = {re.sub(r"^final_norm\.", "norm.", n): t for n, t in ours.items()}
    if "embedding.weight" in ours:
        ours.setdefault("head.weight", ours["embedding.weight"])
    return ours


def _options(arguments: dict[str, Any], params: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keywords of our layer from transformers' configuration and the parameters' shapes."""
    limit = tuple(arguments.get("time_step_limit", (0.0, float("inf"))))
    if limit != (0.0, float("inf")):
        raise ValueError(f"time_step_limit must be (0, inf), got {limit}: steps are not clamped here")
    of = {name.rpartition("mixer.")[2]: t for name, t in params.items()}
    dim, inner = of["in_proj.weight"].shape[1], of["out_proj.weight"].shape[1]
    shared = dict(
        expand=inner // dim, conv=of["conv1d.weight"].shape[-1], conv_bias="conv1d.bias" in of,
        bias="in_proj.bias" in of,
    )  # fmt: skip
    if of["A_log"].dim() == 2:
        return dict(shared, states=of["A_log"].shape[1], rank=of["dt_proj.weight"].shape[1])
    heads, groups = len(of["A_log"]), arguments.get("n_groups", arguments.get("ngroups", 1))
    return dict(
        shared, head_dim=inner // heads, groups=groups, states=(len(of["conv1d.weight"]) - inner) // (2 * groups),
        norm_eps=arguments.get("layer_norm_epsilon", 1e-5),
    )  # fmt: skip


class _Layer:
    """A mixer of either kind, by its parameters."""

    rename = staticmethod(layer)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Mamba | Mamba2:
        kind = Mamba if "x_proj.weight" in params else Mamba2
        module = kind(params["in_proj.weight"].shape[1], **_options(arguments, params))
        load(module, layer(params))
        return module

    @staticmethod
    def run(module: Mamba | Mamba2, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official("huggingface/transformers", "MambaMixer", ours=Mamba)
@official("state-spaces/mamba", "Mamba")
class MambaMixer(_Layer):
    """`Mamba`, of transformers or of the authors."""


@official("huggingface/transformers", "Mamba2Mixer", ours=Mamba2)
@official("state-spaces/mamba", "Mamba2")
class Mamba2Mixer(_Layer):
    """`Mamba2`, of transformers or of the authors (whose default `ngroups` is 1)."""


@official("huggingface/transformers", "MambaForCausalLM", "Mamba2ForCausalLM", ours=MambaLM)
@official("state-spaces/mamba", "MambaLMHeadModel")
class MambaForCausalLM:
    """The language models, with either layer."""

    rename = staticmethod(network)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> MambaLM:
        first = {n.partition("layers.0.")[2]: t for n, t in params.items() if ".layers.0.mixer." in n}
        ours = network(params)
        vocabulary, dim = ours["embedding.weight"].shape
        depth = 1 + max(int(n.split(".")[1]) for n in ours if n.startswith("blocks."))
        options = _options(arguments, first)
        options.pop("norm_eps", None)
        model = MambaLM(
            vocabulary=vocabulary, dim=dim, depth=depth, mixer="mamba" if "mixer.x_proj.weight" in first else "mamba2",
            norm_eps=arguments.get("layer_norm_epsilon", 1e-5),
            tied=torch.equal(ours["head.weight"], ours["embedding.weight"]), **options,
        )  # fmt: skip
        load(model, ours)
        return model

    @staticmethod
    def run(module: MambaLM, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": module(inputs["ids"])}
