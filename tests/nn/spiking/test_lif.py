"""Spiking neurons: their equations, gradients, states, and how busy they are."""

import pytest
import torch

from attnlab.nn.spiking.lif import LIF, _traced, lif


def drive(*shape):
    torch.manual_seed(0)
    return 3 * torch.randn(*shape, dtype=torch.float64)


def by_hand(x, tau=2.0, threshold=1.0):
    v, out = 0.0, []
    for value in x.tolist():
        v += (value - v) / tau
        out.append(float(v >= threshold))
        v = 0.0 if out[-1] else v
    return out


def test_fires_as_a_single_neuron_written_out_does():
    x = drive(40)
    for tau, threshold in ((2.0, 1.0), (3.0, 0.5), (1.0, 1.0)):
        assert lif(x, tau=tau, threshold=threshold)[0].tolist() == by_hand(x, tau, threshold)


@pytest.mark.parametrize("begun", [False, True])
def test_gradients_are_those_of_the_equations_written_out(begun):
    x, v = drive(7, 3, 4).requires_grad_(), (0.3 * drive(3, 4)).requires_grad_()
    state = v if begun else None
    wanted, ours = _traced(x, state, 2.0, 1.0, 4.0), lif(x, state)
    weights = [torch.randn_like(t) for t in ours]
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)
    inputs = [x, v] if begun else [x]
    for a, b in zip(
        *(torch.autograd.grad(sum((t * w).sum() for t, w in zip(outs, weights, strict=True)), inputs)
          for outs in (ours, wanted)), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_the_surrogate_is_the_slope_of_a_sigmoid_and_no_gradient_passes_the_reset():
    x = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    (by,) = torch.autograd.grad(lif(x)[0][1], x)
    s = torch.sigmoid(torch.tensor(4 * (0.5 - 1), dtype=torch.float64))
    # The first step fires (h = 1.5) and is reset, so that nothing of it reaches the second.
    torch.testing.assert_close(by, torch.stack((torch.zeros_like(s), 4 * s * (1 - s) / 2)))


def test_pieces_with_a_state_give_what_the_whole_gives_along_any_axis():
    x = drive(4, 9, 3)
    whole, last = lif(x, axis=1)
    assert set(whole.unique().tolist()) == {0.0, 1.0}
    neurons, state, out = LIF(axis=1), None, []
    for piece in x.split([1, 5, 3], 1):
        spikes, state = neurons(piece, state)
        out.append(spikes)
    assert torch.equal(torch.cat(out, 1), whole) and torch.equal(state, last)
    assert torch.equal(lif(x.movedim(1, 0))[0].movedim(0, 1), whole)
    nothing, same = neurons(x[:, :0], state)
    assert nothing.shape == (4, 0, 3) and same is state


def test_begins_at_rest_unless_it_is_given_a_state():
    neurons, x = LIF(), drive(3, 50)
    first, state = neurons(x, None)
    assert torch.equal(neurons(x), first) and torch.equal(neurons(x), first)
    assert not torch.equal(neurons(x, state)[0], first)


def test_with_and_without_gradients_it_says_the_same():
    x = drive(5, 6).float()
    with torch.no_grad():
        alone = lif(x, torch.full((6,), 0.4))
    assert all(map(torch.equal, lif(x.requires_grad_(), torch.full((6,), 0.4)), alone))


def test_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match="tau must be at least 1"):
        LIF(tau=0.5)
    with pytest.raises(ValueError, match="threshold and slope must be positive"):
        LIF(threshold=0.0)
    with pytest.raises(ValueError, match="axis must be"):
        lif(drive(3), axis=1)
    with pytest.raises(ValueError, match="state must hold one potential per neuron"):
        lif(drive(3, 4), drive(3))
