"""Legendre memory: its matrices, its forms, and what it remembers."""

import pytest
import torch

import attnlab.nn.linear.lmu as lmu
from attnlab.nn.linear.lmu import LMU, convolve, impulse, system
from attnlab.nn.spiking.lmu import SpikingLMU


def by_hand(cell, x):
    """The cell's equations, one step at a time."""
    a, b = system(cell.memory, cell.window)
    m, out = torch.zeros(len(x), cell.memory, dtype=x.dtype), []
    for token in x.unbind(1):
        m = m @ a.T + cell.wu(token).relu() * b
        out.append(cell.wh(torch.cat((m, token), -1)).relu())
    return torch.stack(out, 1)


@pytest.mark.parametrize(("memory", "window"), [(6, 12), (16, 128), (33, 20)])
def test_matrices_are_the_held_discretisation_that_scipy_gives(memory, window):
    signal, np = pytest.importorskip("scipy.signal"), pytest.importorskip("numpy")
    a, b = np.zeros((memory, memory)), np.zeros((memory, 1))
    for i in range(memory):
        b[i] = (2 * i + 1) / window * (-1.0) ** i
        for j in range(memory):
            a[i, j] = (2 * i + 1) / window * (-1 if i < j else (-1.0) ** (i - j + 1))
    wanted = signal.cont2discrete((a, b, np.ones((1, memory)), np.zeros((1, 1))), 1.0, method="zoh")
    for ours, theirs in zip(system(memory, window), wanted[:2], strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs).reshape(ours.shape))


@pytest.mark.parametrize("length", [1, 12, 57])
def test_all_at_once_is_step_by_step(length, monkeypatch):
    torch.manual_seed(0)
    cell, x = LMU(5, memory=7, window=12, out_dim=3).double(), torch.randn(2, length, 5, dtype=torch.float64)
    wanted = by_hand(cell, x)
    torch.testing.assert_close(cell(x), wanted)
    monkeypatch.setattr(lmu, "_SHORT", 8)  # by Fourier transforms
    torch.testing.assert_close(cell(x), wanted)
    torch.testing.assert_close(cell.float()(x.float()), wanted.float(), atol=1e-5, rtol=1e-5)


def test_the_convolution_and_its_gradient_are_the_same_by_both_ways(monkeypatch):
    u, kernel = torch.randn(2, 20, dtype=torch.float64, requires_grad=True), impulse(4, 9, 20).requires_grad_()
    found = []
    for short in (20, 19):
        monkeypatch.setattr(lmu, "_SHORT", short)
        found.append((y := convolve(u, kernel), *torch.autograd.grad(y.pow(3).sum(), (u, kernel))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_the_memory_of_a_constant_is_that_constant_over_the_whole_window():
    cell = LMU(2, memory=8, window=32).double()
    u = torch.full((1, 200), 0.7, dtype=torch.float64)
    memory = cell.after(u, torch.zeros(1, 8, dtype=torch.float64))
    recalled = cell.recall(memory, torch.arange(33, dtype=torch.float64))
    torch.testing.assert_close(recalled, torch.full_like(recalled, 0.7), atol=1e-6, rtol=0)


def test_the_memory_recalls_a_slow_signal_and_forgets_what_is_older_than_the_window():
    cell = LMU(2, memory=12, window=64).double()
    t = torch.arange(400, dtype=torch.float64)
    u = (t / 25).sin()
    u[:100] += 50  # long ago
    memory = cell.after(u[None], torch.zeros(1, 12, dtype=torch.float64))
    delays = torch.arange(4, 60, dtype=torch.float64)
    # A value is held for one step, so that it lies half a step back.
    wanted = ((399 + 0.5 - delays) / 25).sin()
    torch.testing.assert_close(cell.recall(memory, delays)[0], wanted, atol=0.02, rtol=0)


def test_spiking_cells_say_0_and_1_and_keep_the_memory_itself_between_pieces():
    torch.manual_seed(0)
    cell, x = SpikingLMU(6, memory=10, window=16).double().eval(), (torch.rand(2, 30, 6) < 0.4).double()
    for norm in (cell.norm_u, cell.norm_m, cell.norm_h):
        torch.nn.init.constant_(norm.bias, 1.5)
    y = cell(x)
    assert set(y.unique().tolist()) == {0.0, 1.0}
    _, state = cell(x, state=cell.initial_state(2, dtype=torch.float64))
    assert set(state.memory.unique().tolist()) - {0.0, 1.0}


def test_its_matrices_follow_the_weights_and_stand_in_no_checkpoint():
    with torch.device("meta"):
        cell = LMU(4, memory=6, window=10)
    assert set(cell.state_dict()) == {"wu.weight", "wu.bias", "wh.weight", "wh.bias"}
    cell = cell.to_empty(device="cpu").double()
    torch.testing.assert_close(cell.a, system(6, 10)[0], rtol=0, atol=0)
    assert cell.bfloat16().a.dtype == torch.float32


def test_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match="causal only"):
        LMU(4, causal=False)
    for name in ("memory", "window", "out_dim"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            LMU(4, **{name: -1})
