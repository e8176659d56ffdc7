"""Checkpoints in the authors' layout load, and nothing else does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import attnlab
from attnlab.hub.official import find, parse_arguments

GOLDEN = Path(__file__).parents[1] / "goldens" / "focalnet" / "tiny_model.safetensors"


@pytest.fixture
def case():
    """(a randomly initialised network of ours, the authors' parameters, an input, the authors' output)."""
    about = json.loads(GOLDEN.with_suffix(".json").read_text())
    tensors = load_file(GOLDEN)
    params = {n.removeprefix("param."): t for n, t in tensors.items() if n.startswith("param.")}
    built = find(about["repository"], about["name"]).build(parse_arguments(about["arguments"]), params)
    for p in built.parameters():
        torch.nn.init.normal_(p)
    return built.eval(), params, tensors["in.x"], tensors["out.y"]


@pytest.mark.parametrize("form", ["safetensors", "bare", "state_dict", "distributed"])
def test_the_authors_checkpoint_gives_the_authors_output(case, form: str, tmp_path: Path) -> None:
    model, params, x, wanted = case
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        save_file(params, path)
    else:
        named = {f"module.{n}": t for n, t in params.items()} if form == "distributed" else params
        torch.save({"state_dict": named, "epoch": 3} if form == "state_dict" else named, path)
    attnlab.hub.load_official(model, path)
    torch.testing.assert_close(model(x), wanted)


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["ATTNLAB_TEST_CRIME"],)


def test_a_malicious_checkpoint_is_refused_unrun(case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crime = tmp_path / "crime"
    monkeypatch.setenv("ATTNLAB_TEST_CRIME", str(crime))
    torch.save({"state_dict": Malicious()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="refused"):
        attnlab.hub.load_official(case[0], tmp_path / "weights.pth")
    assert not crime.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_corrupt_checkpoint_is_refused(case, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(case[1], path)
    else:
        shutil.copy(GOLDEN, path)
    for bytes_there in (path.read_bytes()[:200], b"hello", b"not a checkpoint", b""):
        path.write_bytes(bytes_there)
        with pytest.raises(ValueError, match=str(path.name)):
            attnlab.hub.load_official(case[0], path)


def test_another_networks_checkpoint_is_refused_by_name(case, tmp_path: Path) -> None:
    model, params, *_ = case
    params.pop("head.bias")
    torch.save({**params, "stranger": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"head\.bias.*stranger"):
        attnlab.hub.load_official(model, tmp_path / "weights.pth")


def test_a_file_of_something_else_is_refused(case, tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="no table of tensors"):
        attnlab.hub.load_official(case[0], tmp_path / "weights.pth")
    with pytest.raises(FileNotFoundError, match="missing"):
        attnlab.hub.load_official(case[0], tmp_path / "missing.pth")


def test_a_model_without_an_official_layout_is_named() -> None:
    with pytest.raises(ValueError, match="Linear"):
        attnlab.hub.load_official(torch.nn.Linear(1, 1), "anything")


def test_a_tensor_of_another_shape_is_refused_by_name(case, tmp_path: Path) -> None:
    model, params, *_ = case
    torch.save({**params, "head.bias": torch.zeros(77)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"head\.bias"):
        attnlab.hub.load_official(model, tmp_path / "weights.pth")
