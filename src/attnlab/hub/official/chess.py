"""junhuihe-hjh/CHESS (arXiv 2409.01366): a sparse feed-forward, a sparse attention, and the quantile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.hub.official.llama import attention
from attnlab.models.skeletons.decoder import SwiGLU
from attnlab.nn.multihead import MultiHead
from attnlab.positions import Rotary
from attnlab.recipes.chess import AttentionThresholds, SparseSwiGLU, quantile, sparsify_attention

_REPOSITORY = "junhuihe-hjh/CHESS"


@official(_REPOSITORY, "llama_mlp_forward_wrapper")
class SparseMLP:
    """The dense feed-forward, and that of each method for which a threshold is given."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> nn.ModuleDict:
        hidden, dim = params["gate_proj.weight"].shape
        dense = SwiGLU(dim, hidden)
        names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
        dense.load_state_dict({f"{ours}.weight": params[f"{theirs}.weight"] for ours, theirs in names.items()})
        methods = {m: SparseSwiGLU(dense, params[f"thr_{m}"]) for m in ("cats", "chess") if f"thr_{m}" in params}
        return nn.ModuleDict({"dense": dense, **methods})

    @staticmethod
    def run(module: nn.ModuleDict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: part(inputs["x"]) for name, part in module.items()}


@official(_REPOSITORY, "llama_attention_forward_wrapper")
class SparseAttention:
    """Causal attention with rotary positions; sparse where thresholds are given."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> MultiHead:
        dim, heads = params["q_proj.weight"].shape[1], arguments["heads"]
        head_dim = len(params["q_proj.weight"]) // heads
        mixer = MultiHead(
            dim,
            heads=heads,
            kv_heads=len(params["k_proj.weight"]) // head_dim,
            head_dim=head_dim,
            causal=True,
            position=Rotary(head_dim, base=arguments.get("theta", 10000.0)),
        )
        mixer.load_state_dict(attention({n: t for n, t in params.items() if "thr_" not in n}), strict=False)
        if "thr_in" in params:
            sparsify_attention(mixer, AttentionThresholds(params["thr_in"], params["thr_out"]))
        return mixer

    @staticmethod
    def run(module: MultiHead, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official(_REPOSITORY, "quantile")
class Quantile:
    """The quantiles of |x| at every whole percent that is at least one entry, as q1 to q99."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Callable[[Tensor, float], Tensor]:
        return quantile

    @staticmethod
    def run(module: Callable[[Tensor, float], Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"].abs()
        percents = [p for p in range(1, 100) if int(x.numel() * p / 100) >= 1]
        return {f"q{p}": torch.atleast_1d(module(x, p / 100)) for p in percents}
