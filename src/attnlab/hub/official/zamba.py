"""Zamba2 (arXiv 2411.15242): transformers' network, and the checkpoints that Zyphra released in its form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.official.mamba import layer
from attnlab.hub.renaming import Rule, load, rename
from attnlab.models.language.zamba import Zamba2

_MATRICES = {"self_attn.o_proj": "wo", "feed_forward.gate_up_proj": "w13", "feed_forward.down_proj": "w2",
             "input_layernorm": "norm1", "pre_ff_layernorm": "norm2"}  # fmt: skip
_BLOCKS: tuple[Rule, ...] = (
    (r"\.mamba_decoder\.", "."),
    (r"^layers\.(\d+)\.input_layernorm\.", r"blocks.\1.norm1."),
    (r"^layers\.(\d+)\.mamba\.", r"blocks.\1.mixer."),
    (r"^embed_tokens\.", "embedding."),
    (r"^final_layernorm\.", "final_norm."),  # later "norm.", which the layers' rules would take for a mixer's
    (r"^lm_head\.", "head."),
)


def network(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters by our names; a tied head, and the later copies of the shared layers, may be left out."""
    params = {name.removeprefix("model."): tensor for name, tensor in params.items()}
    own = {name: t for name, t in params.items() if ".shared_transformer." not in name and ".linear." not in name}
    ours = layer(rename(own, _BLOCKS))
    ours["norm.weight"] = ours.pop("final_norm.weight")
    ours.setdefault("head.weight", ours["embedding.weight"])
    at, shared = _uses(params)

    def of(use: int, name: str) -> Tensor:
        return params[f"layers.{at[use % shared]}.shared_transformer.{name}.weight"]

    for i in range(shared):
        ours |= {f"shared.{i}.{name}.weight": of(i, theirs) for theirs, name in _MATRICES.items()}
        ours[f"shared.{i}.wqkv.weight"] = torch.cat([of(i, f"self_attn.{n}_proj") for n in "qkv"])
    adapted = any("linear_q_adapter" in name for name in params)
    for use, place in enumerate(at):
        ours[f"uses.{use}.out.weight"] = params[f"layers.{place}.linear.weight"]
        for i in (0, 1):
            ours[f"uses.{use}.mlp.{i}.weight"] = of(use, f"feed_forward.gate_up_proj_adapter_list.{use}.{i}")
        if adapted:
            names = [f"self_attn.linear_{n}_adapter_list.{use}" for n in "qkv"]
            ours[f"uses.{use}.qkv_down.weight"] = torch.cat([of(use, f"{n}.0") for n in names])
            ours[f"uses.{use}.qkv_up"] = torch.stack([of(use, f"{n}.1").T for n in names])
    return ours


def _uses(params: Mapping[str, Tensor]) -> tuple[list[int], int]:
    """The layers that a shared layer speaks into, and how many of these there are."""
    at = sorted({int(name.split(".")[1]) for name in params if ".linear.weight" in name})
    first = re.compile(rf"layers\.{at[0]}\.shared_transformer\.feed_forward\.gate_up_proj_adapter_list\.(\d+)\.0")
    # A shared layer has the adapters of all its uses: of the first, and of those after every turn.
    served = sorted(int(m[1]) for name in params if (m := first.search(name)))
    return at, served[1] if len(served) > 1 else len(at)


@official("huggingface/transformers", "Zamba2ForCausalLM", ours=Zamba2)
class Zamba2ForCausalLM:
    """The language model."""

    rename = staticmethod(network)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Zamba2:
        params = {name.removeprefix("model."): tensor for name, tensor in params.items()}
        ours, (at, shared) = network(params), _uses(params)
        vocabulary, dim = ours["embedding.weight"].shape
        inner, heads = ours["blocks.0.mixer.wo.weight"].shape[1], len(ours["blocks.0.mixer.a_log"])
        groups, conv = arguments.get("mamba_ngroups", 1), ours["blocks.0.mixer.conv.weight"]
        model = Zamba2(
            vocabulary=vocabulary, dim=dim, depth=1 + max(int(n.split(".")[1]) for n in ours if n[:7] == "blocks."),
            at=at, shared=shared, heads=arguments.get("num_attention_heads", 32),
            hidden=ours["shared.0.w2.weight"].shape[1], rank=len(ours["uses.0.mlp.0.weight"]),
            adapted="uses.0.qkv_up" in ours, rotary=arguments.get("use_mem_rope", False),
            states=(len(conv) - inner) // (2 * groups), head_dim=inner // heads, groups=groups, expand=inner // dim,
            conv=conv.shape[1], least_step=arguments.get("time_step_min", 1e-3),
            norm_eps=arguments.get("rms_norm_eps", 1e-5),
            tied=torch.equal(ours["head.weight"], ours["embedding.weight"]),
        )  # fmt: skip
        load(model, ours)
        return model

    @staticmethod
    def run(module: Zamba2, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": module(inputs["ids"])}
