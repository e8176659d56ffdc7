"""NATTEN as a backend: what it refuses, and that it is called in its own layout and names (it needs a GPU)."""

import dataclasses
import sys
import types

import pytest
import torch

from attnlab import attend
from attnlab.attend import pose
from attnlab.backends import natten
from attnlab.patterns import Causal, Neighborhood


def on_gpu(pattern, *, tokens=20, dim=32, dtype=torch.float32, **keywords):
    q = torch.zeros(1, 2, tokens, dim, dtype=dtype)
    return dataclasses.replace(pose(q, q, q, pattern=pattern, **keywords), device=torch.device("cuda"))


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (on_gpu(Causal()), "only Neighborhood"),
        (on_gpu(Neighborhood((4, 5), 3) & Causal()), "only Neighborhood"),
        (on_gpu(Neighborhood((1, 2, 2, 5), 1)), "4 axes"),
        (on_gpu(Neighborhood((4, 5), 3), bias=torch.zeros(20, 20)), "bias"),
        (on_gpu(Neighborhood((4, 5), 3), dropout=0.1), "dropout"),
        (on_gpu(Neighborhood((4, 5), 3), dtype=torch.float64), "float64"),
        (on_gpu(Neighborhood((4, 5), 3), dim=12), "head dimension 12"),
        (on_gpu(Neighborhood((4, 5), 3), weighting="relu"), "only softmax"),
        (dataclasses.replace(on_gpu(Neighborhood((4, 5), 3), return_lse=True), needs_grad=True), "gradient of the lse"),
        (dataclasses.replace(on_gpu(Neighborhood((4, 5), 3)), device=torch.device("cpu")), "device cpu"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_it_cannot_do_is_said(problem, reason):
    assert reason in natten.Natten().unsupported(problem)


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(natten, "find_spec", lambda name: None)
    natten._missing.cache_clear()
    assert "pip install attnlab[gpu]" in natten.Natten().unsupported(on_gpu(Neighborhood((4, 5), 3)))
    natten._missing.cache_clear()


def test_heads_come_after_the_grid_and_go_back(monkeypatch):
    pattern = Neighborhood((4, 5), (3, 2), (1, 2), (2, 1), (True, False))
    called = {}

    def na2d(q, k, v, **keywords):
        called.update(keywords, shape=tuple(q.shape))
        ours = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
        out, lse = attend(*ours, pattern=pattern, scale=keywords["scale"], return_lse=True)
        return out.transpose(1, 2).unflatten(1, (4, 5)), lse.transpose(1, 2).unflatten(1, (4, 5))

    fake = types.ModuleType("natten")
    fake.functional = types.SimpleNamespace(na2d=na2d)
    monkeypatch.setitem(sys.modules, "natten", fake)
    q, k, v = (torch.randn(2, 3, 20, 8) for _ in range(3))
    problem = pose(q, k, v, pattern=pattern, scale=0.3, return_lse=True)
    out, lse = natten.Natten().run(problem, q, k, v)
    wanted, wanted_lse = attend(q, k, v, pattern=pattern, scale=0.3, return_lse=True)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    names = {"kernel_size": (3, 2), "dilation": (1, 2), "stride": (2, 1), "is_causal": (True, False)}
    assert called == {**names, "scale": 0.3, "return_lse": True, "shape": (2, 4, 5, 3, 8)}


def test_its_cost_follows_the_model_of_tiles():
    near, far = (natten.Natten().cost(on_gpu(Neighborhood((64, 64), k), tokens=4096)) for k in (8, 32))
    assert near.flops < far.flops < on_gpu(Neighborhood((64, 64), 8), tokens=4096).pairs * 2 * 64
    # A dilated neighborhood costs the same: its residues are grids of their own.
    wide = natten.Natten().cost(on_gpu(Neighborhood((64, 64), 8, 2), tokens=4096))
    assert wide.flops == pytest.approx(near.flops, rel=0.6)


def test_its_own_cpu_path_gives_the_same_numbers():
    functional = pytest.importorskip("natten.functional")
    # Its CPU path wants a head dimension of at least 32.
    for grid, rule in (((9,), dict(kernel=4, dilation=2, causal=True)), ((6, 7), dict(kernel=(3, 4), stride=(1, 2)))):
        q, k, v = (torch.randn(1, *grid, 2, 32) for _ in range(3))
        pattern = Neighborhood(grid, **rule)
        theirs = getattr(functional, f"na{len(grid)}d")(
            q, k, v, kernel_size=pattern.kernel, stride=pattern.stride, dilation=pattern.dilation,
            is_causal=pattern.causal, backend="flex-fna",
        )  # fmt: skip
        ours = attend(*(x.flatten(1, -3).transpose(1, 2) for x in (q, k, v)), pattern=pattern)
        torch.testing.assert_close(ours.transpose(1, 2).unflatten(1, grid), theirs, rtol=0, atol=1e-5)
