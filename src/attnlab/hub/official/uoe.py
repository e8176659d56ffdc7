"""YujiaoYang-work/UoE (arXiv 2503.02495): its language models, and their attention and MLP with residual and norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import load
from attnlab.models.language.uoe import UnionLM
from attnlab.nn.channel.union_mlp import UnionMLP
from attnlab.nn.sparse.union_attention import UnionAttention


class Around(nn.Module):
    """norm(x + mechanism(x)), or x + mechanism(x) with `norm=None`."""

    def __init__(self, mechanism: UnionAttention | UnionMLP, norm: nn.Module | None) -> None:
        super().__init__()
        self.mechanism, self.norm = mechanism, norm

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.mechanism(x)
        return y if self.norm is None else self.norm(y)


def attention(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of one attention under our names; its norm is left out."""
    return {
        **gate(params),
        "wqkv": torch.cat((params["W_q.weight.0"], params["W_kv.weight.0"]), -1),
        "bqkv": torch.cat((params["W_q.bias.0"], params["W_kv.bias.0"]), -1).squeeze(1),
        "wo": params["ff.weight.0"],
        "bo": params["ff.bias"],
    }


def mlp(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of one MLP under our names; its norm, and a third layer that is never used, are left out."""
    return {
        **gate(params),
        "w1": params["linear1.weight.0"],
        "b1": params["linear1.bias.0"].squeeze(1),
        "w2": params["linear2.weight.0"],
        "b2": params["linear2.bias"],
    }


def gate(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"gate.linear.{end}": params[f"switch_gate.w_gate.{end}"] for end in ("weight", "bias")}


def _around(mechanism: UnionAttention | UnionMLP, arguments: dict[str, Any], params: Mapping[str, Tensor]) -> Around:
    """With the norm of `params`, if it comes behind."""
    if arguments.get("pre_lnorm"):
        return Around(mechanism, None)
    norm = nn.LayerNorm(mechanism.dim)
    load(norm, {end: params[f"layer_norm.{end}"] for end in ("weight", "bias")})
    return Around(mechanism, norm)


def _run(module: Around, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"y": module(inputs["x"]), "gates": module.mechanism.gate(inputs["x"])}


@official("YujiaoYang-work/UoE", "SparseSelfAttention", ours=UnionAttention)
class SparseSelfAttention:
    """Causal, half of the heads for each token."""

    rename = staticmethod(attention)
    run = staticmethod(_run)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Around:
        heads, dim, _ = params["W_q.weight.0"].shape
        module = UnionAttention(
            dim,
            heads=heads,
            active=heads // 2,
            variant="release",
            capacity=arguments.get("capacity", 1.0),
            eps=arguments.get("epsilon", 1e-8),
            dropout=arguments.get("dropout", 0.0),
            causal=True,
        )
        load(module, attention(params))
        return _around(module, arguments, params)


@official("YujiaoYang-work/UoE", "U_MLP", ours=UnionMLP)
class UMLP:
    """Data selection: tokens choose. By the dispatch of `process_ds`, or with the argument `share=0.5` by its own."""

    rename = staticmethod(mlp)
    run = staticmethod(_run)

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Around:
        experts, dim, inner = params["linear1.weight.0"].shape
        module = UnionMLP(
            dim,
            hidden=experts * inner,
            experts=experts,
            active=arguments.get("topk", 2),
            variant="release",
            share=arguments.get("share"),
            release_order=arguments.get("share") is None,
            capacity=arguments.get("capacity", 1.0),
            eps=arguments.get("epsilon", 1e-8),
            dropout=arguments.get("dropout", 0.0),
        )
        load(module, mlp(params))
        return _around(module, arguments, params)


_MODEL = {
    "word_emb.emb_layers.0.weight": "embedding.weight",
    "crit.out_layers.0.bias": "embedding.bias",
    "crit.cluster_weight": "embedding.cluster_weight",
    "crit.cluster_bias": "embedding.cluster_bias",
}
# Of each layer: their name, ours, that of its norm, and what reads it.
_HALVES = (("dec_attn", "mixer", "norm1", attention), ("pos_ff", "mlp", "norm2", mlp))


@official("YujiaoYang-work/UoE", "MemTransformerLM", ours=UnionLM)
class MemTransformerLM:
    """Word ids of one segment `(N, B)` to log probabilities `(B, N, V)`: `attn_type=5`, one table of words."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed = {_MODEL[name]: tensor for name, tensor in params.items() if name in _MODEL}
        renamed["places"] = params["r_emb"].flatten(2)
        for layer in sorted({name.split(".")[1] for name in params if name.startswith("layers.")}, key=int):
            for theirs, ours, norm, read in _HALVES:
                home = f"layers.{layer}.{theirs}."
                half = {n.removeprefix(home): t for n, t in params.items() if n.startswith(home)}
                renamed |= {f"blocks.{layer}.{ours}.{n}": t for n, t in read(half).items()}
                renamed |= {f"blocks.{layer}.{norm}.{end}": half[f"layer_norm.{end}"] for end in ("weight", "bias")}
        return renamed

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> UnionLM:
        if arguments.get("pre_lnorm"):
            raise ValueError("pre_lnorm must be False: the norms of the released models come behind")
        experts, dim, inner = params["layers.0.pos_ff.linear1.weight.0"].shape
        depth, reach = params["r_emb"].shape[:2]
        model = UnionLM(
            vocabulary=len(params["word_emb.emb_layers.0.weight"]),
            dim=dim,
            depth=depth,
            heads=len(params["layers.0.dec_attn.W_q.weight.0"]),
            hidden=experts * inner,
            experts=experts,
            cutoffs=arguments.get("cutoffs", ()),
            memory=arguments.get("mem_len", 0),
            reach=reach,
            variant="release",
            dropout=arguments.get("dropout", 0.0),
        )
        load(model, MemTransformerLM.rename(params))
        return model.eval()

    @staticmethod
    def run(module: UnionLM, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["data"].t())}
