"""The GPU kernels: which one serves which scan, in the shapes that it takes; clear errors where they are missing."""

import sys
from types import ModuleType

import pytest
import torch

from attnlab.scan import fla, scan


def test_without_cuda_the_backend_says_so():
    x = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match="CUDA only"):
        scan(x, x, x, backend="fla")


class OnCuda(torch.Tensor):
    """A CPU tensor that says that it is on a GPU."""

    is_cuda = True


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(fla, "installed", lambda: False)
    x = torch.zeros(1, 1, 4, 2).as_subclass(OnCuda)
    with pytest.raises(ValueError, match=r"pip install 'attnlab\[gpu\]'"):
        fla.run(x, x, x, None, None, 1.0, torch.zeros(1, 1, 2, 2), None)


@pytest.mark.parametrize(
    ("decay", "beta", "kernel"),
    [
        (None, False, "chunk_simple_gla"),
        ("head", False, "chunk_simple_gla"),
        ("channel", False, "chunk_gla"),
        (None, True, "chunk_delta_rule"),
        ("head", True, "chunk_gated_delta_rule"),
        ("channel", True, "chunk_kda"),
    ],
)
def test_each_kind_of_scan_has_its_kernel(monkeypatch, decay, beta, kernel):
    """The kernels are played by our own scan behind their calling convention: (B, T, H, D), log decay `g`."""
    called = []

    def play(name):
        def run(q, k, v, scale, initial_state, output_final_state, g=None, beta=None, cu_seqlens=None):
            called.append(name)
            heads = {"q": q, "k": k, "v": v, "decay": g, "beta": beta}
            heads = {n: None if t is None else t.transpose(1, 2) for n, t in heads.items()}
            out, state = scan(**heads, scale=scale, state=initial_state, cu_seqlens=cu_seqlens, backend="recurrent")
            return out.transpose(1, 2), state if output_final_state else None

        return run

    ops = ModuleType("fla.ops")
    for name in ("chunk_simple_gla", "chunk_gla", "chunk_delta_rule", "chunk_gated_delta_rule", "chunk_kda"):
        setattr(ops, name, play(name))
    package = ModuleType("fla")
    package.ops = ops
    monkeypatch.setitem(sys.modules, "fla", package)
    monkeypatch.setitem(sys.modules, "fla.ops", ops)
    monkeypatch.setattr(fla, "installed", lambda: True)

    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4), torch.randn(1, 4, 9, 3)
    g = None if decay is None else -torch.rand(1, 4, 9, *([4] if decay == "channel" else []))
    b = torch.rand(1, 4, 9) if beta else None
    state = torch.randn(2, 4, 4, 3)
    got = fla.run(q.as_subclass(OnCuda), k, v, g, b, 0.5, state, [0, 5, 9])
    wanted = scan(q, k, v, decay=g, beta=b, scale=0.5, state=state, cu_seqlens=[0, 5, 9], backend="recurrent")
    assert called == [kernel]
    torch.testing.assert_close([t.as_subclass(torch.Tensor) for t in got], list(wanted), rtol=1e-5, atol=1e-6)
