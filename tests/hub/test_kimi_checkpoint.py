"""Kimi Linear's checkpoints load in both of their layouts: transformers' and the authors' own."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import attnlab
from attnlab.hub.official import find

GOLDEN = Path(__file__).parents[1] / "goldens" / "kda" / "tiny_model.safetensors"


def released(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as the authors' own code names them: a convolution for each of q, k and v, each expert apart."""
    found: dict[str, Tensor] = {}
    for name, tensor in params.items():
        prefix, _, last = name.rpartition(".mlp.")
        if name.endswith("conv1d.weight"):
            for x, part in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("conv1d", f"{x}_conv1d")] = part.contiguous()
        elif last == "experts.gate_up_proj":
            for n, expert in enumerate(tensor):
                for w, part in zip(("w1", "w3"), expert.chunk(2), strict=True):
                    found[f"{prefix}.block_sparse_moe.experts.{n}.{w}.weight"] = part.contiguous()
        elif last == "experts.down_proj":
            for n, expert in enumerate(tensor):
                found[f"{prefix}.block_sparse_moe.experts.{n}.w2.weight"] = expert.contiguous()
        elif last.startswith(("gate.", "shared_experts.")):
            found[f"{prefix}.block_sparse_moe.{last}"] = tensor
        else:
            found[name.replace("forget_gate.", "")] = tensor
    return found


@pytest.mark.parametrize("layout", ["transformers", "released"])
def test_the_checkpoint_gives_the_authors_output(layout: str, tmp_path: Path) -> None:
    about, tensors = json.loads(GOLDEN.with_suffix(".json").read_text()), load_file(GOLDEN)
    params = {n.removeprefix("param."): t for n, t in tensors.items() if n.startswith("param.")}
    model = find(about["repository"], about["name"]).build(ast.literal_eval(about["arguments"]), params)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    save_file(released(params) if layout == "released" else params, tmp_path / "weights.safetensors")
    attnlab.hub.load_official(model, tmp_path / "weights.safetensors")
    torch.testing.assert_close(model.eval()(tensors["in.input_ids"]), tensors["out.y"])
