"""S4D: the convolution against its recurrence, kernels from two tables, both directions, and its first values."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from attnlab.nn.linear.diagonal_ssm import S4D

D = torch.float64


def run(m: S4D, u: Tensor, reads: Tensor) -> Tensor:
    """The recurrence of one direction, step by step: (B, N, C) to (B, K, C, N)."""
    rates = torch.complex(-m.decay_log.exp(), m.turn)
    step = (rates * m.step_log.exp()[:, None]).exp()  # (C, S/2)
    into = torch.view_as_complex(reads) * (step - 1) / rates
    state, out = torch.zeros(len(u), *step.shape, dtype=torch.complex128), []
    for token in u.unbind(1):
        state = step * state + token[..., None]
        out.append(2 * (into * state[:, None]).sum(-1).real)
    return torch.stack(out, -1)


@pytest.mark.parametrize("tokens", [1, 37])
def test_causal_equals_the_recurrence(tokens: int) -> None:
    m, u = S4D(6, states=8, copies=3, causal=True).double(), torch.randn(2, tokens, 6, dtype=D)
    s = run(m, u, m.reads) + m.skip[..., None] * u.mT[:, None]
    torch.testing.assert_close(m(u), m.wo(gelu(s).flatten(1, 2).mT))


def test_both_directions_are_a_recurrence_each() -> None:
    m, u = S4D(6, states=8, copies=2).double(), torch.randn(2, 21, 6, dtype=D)
    later, earlier = m.reads.chunk(2)
    back = run(m, u.flip(1), earlier).flip(-1)
    back = torch.cat((back[..., 1:], torch.zeros_like(back[..., :1])), -1)  # of the tokens after, not its own
    s = run(m, u, later) + back + m.skip[..., None] * u.mT[:, None]
    torch.testing.assert_close(m(u), m.wo(gelu(s).flatten(1, 2).mT))


def test_kernels_from_two_tables_are_those_of_every_power() -> None:
    m = S4D(5, states=6, copies=2).double()
    exponents, reads = m.system()
    for length in (1, 2, 9, 50):
        each = (exponents[..., None] * torch.arange(length)).exp()
        torch.testing.assert_close(m.kernels(length), 2 * torch.einsum("kcn,cnl->kcl", reads, each).real)


def test_it_begins_as_s4d_inv() -> None:
    """Re w = −½, Im w = S/π (S/(2n + 1) − 1), and steps between 0.001 and 0.1."""
    m = S4D(64, states=16)
    torch.testing.assert_close(-m.decay_log.exp(), torch.full((8,), -0.5))
    torch.testing.assert_close(m.turn, torch.tensor([16 / math.pi * (16 / (2 * n + 1) - 1) for n in range(8)]))
    assert 1e-3 <= m.step_log.exp().min() and m.step_log.exp().max() <= 0.1


def test_a_long_text_reaches_the_end_through_a_bounded_state() -> None:
    """Where modes fade slowly, what the first token did is there after 2,000 steps, in S numbers."""
    m = S4D(4, states=8, causal=True).double()
    with torch.no_grad():
        m.decay_log.fill_(math.log(1e-3))
    x = torch.zeros(1, 2000, 4, dtype=D)
    other = x.clone()
    other[:, 0] = 1.0
    assert (m(other) - m(x))[:, -1].abs().max() > 1e-5
    _, state = m(x, state=m.initial_state(1, dtype=D))
    assert state.modes.numel() == 4 * 8


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="states must be even"):
        S4D(8, states=5)
    with pytest.raises(ValueError, match="copies"):
        S4D(8, copies=0)
    with pytest.raises(ValueError, match="takes no context"):
        S4D(8)(torch.randn(1, 4, 8), torch.randn(1, 4, 8))
