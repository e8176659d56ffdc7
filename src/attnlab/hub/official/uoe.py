"""YujiaoYang-work/UoE (arXiv 2503.02495): attention and MLP of its language models, with residual and norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.renaming import load
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
