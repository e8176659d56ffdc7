"""lucidrains/titans-pytorch, the open implementation of Titans (arXiv 2501.00663; the authors have released none)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.hub.renaming import Rule, load, rename
from attnlab.nn.memory.chunk_memory import ChunkMemory

_RULES: tuple[Rule, ...] = (
    (r"^store_norm\.", "write_norm."),
    (r"^retrieve_norm\.", "read_norm."),
    (r"^to_queries\.(0\.)?", "wq."),
    (r"^to_adaptive_step\.0\.", "rate."),
    (r"^to_momentum\.0\.", "momentum."),
    (r"^to_decay_factor\.0\.", "forget."),
    (r"^q_norm\.gamma$", "q_gain"),
    (r"^k_norm\.gamma$", "k_gain"),
    (r"^multihead_rmsnorm\.gamma$", "out_gain"),
    (r"^retrieve_gate\.0\.", "gate."),
    (r"^combine_heads\.", "wo."),
)
# What a constructor may be given, and what each must then be, as ours knows no other.
_FIXED = {
    "batch_size": None, "model": None, "adaptive_step_transform": None, "per_parameter_lr_modulation": False,
    "attn_pool_chunks": False, "momentum_order": 1, "learned_momentum_combine": False, "num_kv_per_token": 1,
    "qkv_receives_diff_views": False, "pre_rmsnorm": True, "max_grad_norm": None, "activation": None,
    "accept_weight_residual": False, "spectral_norm_surprises": False, "gated_transition": False,
    "store_with_lookahead_value": False,
}  # fmt: skip


@official("lucidrains/titans-pytorch", "NeuralMemory", ours=ChunkMemory)
class NeuralMemory:
    """The memory written once per chunk. Of its model's weights `memory_model_parameters.i` are the ones that count."""

    @staticmethod
    def rename(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {n: t for n, t in params.items() if not n.startswith(("memory_model.", "memory_model_parameters."))}
        ours = rename({n: t for n, t in kept.items() if not re.match(r"to_(keys|values)\.", n)}, _RULES)
        ours["wkv.weight"] = torch.cat(
            [next(t for n, t in kept.items() if n.startswith(f"to_{w}.")) for w in ("keys", "values")]
        )
        weights = [t for _, t in sorted(_numbered(params).items())]
        if weights[0].dim() == 2:  # of shape (heads, dim): the gain of the residual's norm comes first
            ours["memory.gain"] = weights.pop(0).unsqueeze(1)
        return {**ours, **{f"memory.matrices.{i}": w for i, w in enumerate(weights)}}

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> ChunkMemory:
        for name, wanted in _FIXED.items():
            if arguments.get(name, wanted) != wanted:
                raise ValueError(f"{name} must be {wanted!r}, got {arguments[name]!r}: there is no such memory here")
        chunk = arguments.get("chunk_size", 1)
        if not isinstance(chunk, int):
            if chunk[0] != chunk[1]:
                raise ValueError(f"chunk_size must be the same for reading and writing, got {chunk}")
            chunk = chunk[0]
        heads, model = arguments.get("heads", 1), arguments.get("default_model_kwargs", {})
        module = ChunkMemory(
            arguments["dim"],
            heads=heads,
            head_dim=arguments.get("dim_head") or arguments["dim"],
            depth=model.get("depth", 2),
            expansion=model.get("expansion_factor", 4.0 if not model else 2.0),
            chunk=chunk,
            max_rate=arguments.get("default_step_transform_max_lr", 1.0),
            momentum=arguments.get("momentum", True),
            residual=arguments.get("mem_model_norm_add_residual", True),
            qk_norm=arguments.get("qk_rmsnorm", False),
            out_norm=arguments.get("post_rmsnorm", False),
        )
        if not arguments.get("per_head_learned_parameters", True):
            shared = {f"memory_model_parameters.{i}": t for i, t in _numbered(params).items()}
            params = {**params, **{n: t.expand(heads, *t.shape) for n, t in shared.items()}}
        load(module, NeuralMemory.rename(params))
        return module

    @staticmethod
    def run(module: ChunkMemory, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"retrieved": module(inputs["x"])}


def _numbered(params: Mapping[str, Tensor]) -> dict[int, Tensor]:
    found = {n: re.fullmatch(r"memory_model_parameters\.(\d+)", n) for n in params}
    return {int(m[1]): params[n] for n, m in found.items() if m}
