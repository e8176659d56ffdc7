"""Every golden file, made with the authors' own code, passes through the adapter of its class: outputs and gradients.

pytest tests/test_goldens.py --goldens DIR
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from attnlab.hub.official import find, parse_arguments

# Float32 rounding through a network: relative to the largest entry, a few hundred units in the last place.
TOLERANCE = 2e-5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = Path(metafunc.config.getoption("--goldens"))
    files = sorted(folder.rglob("*.safetensors"))
    metafunc.parametrize("path", files, ids=[f"{f.parent.name}/{f.stem}" for f in files])


def test_equals_the_authors_code(path: Path) -> None:
    case = json.loads(path.with_suffix(".json").read_text())
    groups: dict[str, dict[str, Tensor]] = {"in": {}, "param": {}, "out": {}, "w": {}, "grad_in": {}}
    for name, tensor in load_file(path).items():
        kind, _, rest = name.partition(".")
        groups[kind][rest] = tensor
    inputs = {n: t.requires_grad_(n in groups["grad_in"]) for n, t in groups["in"].items()}

    adapter = find(case["repository"], case["name"])
    module = adapter.build(parse_arguments(case["arguments"], case["name"], case.get("call") or ""), groups["param"])
    if isinstance(module, torch.nn.Module):
        module.eval()
    outputs = adapter.run(module, inputs)

    missing = sorted(set(groups["out"]) - set(outputs))
    assert not missing, f"the adapter gives no {missing}; it gives {sorted(outputs)}"
    for name, wanted in groups["out"].items():
        compare(outputs[name], wanted, f"out.{name}")
    if groups["grad_in"]:
        weights = groups["w"] or {n: torch.ones_like(t) for n, t in groups["out"].items()}
        loss = sum((outputs[n] * w).sum() for n, w in weights.items())
        names = list(groups["grad_in"])
        gradients = torch.autograd.grad(loss, [inputs[n] for n in names], allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            wanted = groups["grad_in"][name]
            compare(torch.zeros_like(wanted) if gradient is None else gradient, wanted, f"grad_in.{name}")


def compare(ours: Tensor, wanted: Tensor, name: str) -> None:
    ours = torch.as_tensor(ours)
    assert ours.shape == wanted.shape, f"{name}: shape {tuple(ours.shape)}, wanted {tuple(wanted.shape)}"
    if not wanted.is_floating_point():
        assert torch.equal(ours.to(wanted.dtype), wanted), f"{name} differs"
        return
    ours, wanted = ours.detach().double(), wanted.double()
    finite = wanted.isfinite()
    assert torch.equal(ours.isfinite(), finite) and torch.equal(ours[~finite], wanted[~finite]), (
        f"{name}: other infinities"
    )
    error = (ours - wanted)[finite].abs().max().item() if finite.any() else 0.0
    scale = max(wanted[finite].abs().max().item() if finite.any() else 0.0, 1e-3)
    assert error <= TOLERANCE * scale, f"{name}: off by {error / scale:.1e} of its largest entry {scale:.1e}"
