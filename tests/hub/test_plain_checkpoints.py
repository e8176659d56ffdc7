"""The authors' checkpoints of VOLO and of the agent networks load into networks that were built without them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attnlab.hub import load_official
from attnlab.hub.official import find, parse_arguments

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.mark.parametrize(
    "case", ["volo/tiny_model", "volo/outlook_s2", "agent_attention/net_deit", "agent_attention/net_swin",
             "agent_attention/net_pvt"],
)  # fmt: skip
def test_load_official_gives_the_authors_output(case: str, tmp_path: Path) -> None:
    about = json.loads((GOLDENS / f"{case}.json").read_text())
    tensors = load_file(GOLDENS / f"{case}.safetensors")
    params = {n.removeprefix("param."): t for n, t in tensors.items() if n.startswith("param.")}
    adapter = find(about["repository"], about["name"])
    model = copy.deepcopy(adapter.build(parse_arguments(about["arguments"]), params)).eval()
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    save_file(params, tmp_path / "released.safetensors")
    load_official(model, tmp_path / "released.safetensors")
    torch.testing.assert_close(adapter.run(model, {"x": tensors["in.x"]})["y"], tensors["out.y"])
