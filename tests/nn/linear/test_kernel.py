"""Kernel attention: the definition with all its scores, whichever way it is computed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab.nn.linear.kernel import KERNELS, KernelAttention
from attnlab.nn.linear.linear_attention import LinearAttention
from attnlab.patterns import Causal, Full, Window
from attnlab.positions import ALiBi, Rotary

DIM = 24


def make(**keywords) -> KernelAttention:
    torch.manual_seed(0)
    return KernelAttention(DIM, **{"heads": 4, **keywords}).double().eval()


def tokens(n: int = 7) -> Tensor:
    return 2 * torch.randn(2, n, DIM, dtype=torch.float64)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pattern", [Full(), Causal(), Window(3)], ids=str)
def test_equals_the_definition(normalise: bool, kernel: str, pattern) -> None:
    causal = isinstance(pattern, Causal)
    m, x = make(normalise=normalise, kernel=kernel, causal=causal, position=Rotary(6)), tokens()
    q, k, v = m.project(x)
    if kernel == "elu":
        q, k = (torch.where(t > 0, t + 1, t.exp()) for t in (q, k))
    elif kernel == "mlp":
        q, k = (t @ m.w1.weight.T for t in (q, k))
        q, k = (t.clamp_min(0) @ m.w2.weight.T for t in (q, k))
    weights = q @ k.mT / math.sqrt(6) * pattern.matrix(7)
    total = weights.sum(-1, keepdim=True)
    if normalise:
        weights = weights / (total + 1e-8 if kernel == "elu" else total.abs().clamp_min(1))
    given = {} if causal or isinstance(pattern, Full) else {"pattern": pattern}
    torch.testing.assert_close(m(x, **given), m.merge(weights @ v))
    torch.testing.assert_close(m.weights(x, **given), weights)


def test_normalised_elu_without_positions_is_linear_attention() -> None:
    m, x = make(kernel="elu", causal=True), tokens()
    other = LinearAttention(DIM, heads=4, causal=True).double()
    other.load_state_dict(m.state_dict())
    torch.testing.assert_close(m(x), other(x), rtol=1e-5, atol=1e-6)  # its ε is 1e-6


def test_streaming_turns_each_piece_to_its_place() -> None:
    m, x = make(kernel="elu", causal=True, position=Rotary(6)), tokens(9)
    state, out = m.initial_state(2, dtype=torch.float64), []
    for piece in x.split([4, 1, 4], 1):
        y, state = m(piece, state=state)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), m(x))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="kernel must be one of"):
        make(kernel="exp")
    with pytest.raises(ValueError, match="position must turn"):
        make(position=ALiBi(4))
