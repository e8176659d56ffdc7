"""Attention by similarities: the definition by hand, and what it shares with softmax and sigmoid attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab.nn.softmax.sigmoid import SigmoidAttention
from attnlab.nn.softmax.similarity import SimilarityAttention
from attnlab.patterns import Causal, Full, Window
from attnlab.positions import Rotary
from attnlab.weightings import Relu

DIM = 24


def make(**keywords) -> SimilarityAttention:
    torch.manual_seed(0)
    return SimilarityAttention(DIM, **{"heads": 4, "kv_heads": 2, **keywords}).double().eval()


def tokens(n: int = 7) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("similarity", ["sigmoid", "elu", Relu()], ids=str)
@pytest.mark.parametrize("pattern", [Full(), Causal(), Window(3)], ids=str)
def test_equals_the_definition(normalise: bool, similarity, pattern) -> None:
    m, x = make(normalise=normalise, similarity=similarity), tokens()
    q, k, v = m.qkv(x)
    scores = q @ k.repeat_interleave(2, 1).mT / math.sqrt(6)
    function = {"sigmoid": torch.sigmoid, "elu": lambda s: torch.where(s > 0, s + 1, s.exp())}
    weights = function.get(similarity, lambda s: s.clamp_min(0) / 7)(scores) * pattern.matrix(7)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-8)
    torch.testing.assert_close(m(x, pattern=pattern), m.merge(weights @ v.repeat_interleave(2, 1)))
    torch.testing.assert_close(m.weights(x, pattern=pattern), weights)


def test_the_sigmoid_alone_is_sigmoid_attention_without_its_shift() -> None:
    m, x = make(causal=True, position=Rotary(6)), tokens()
    other = SigmoidAttention(DIM, heads=4, kv_heads=2, shift=0.0, causal=True, position=Rotary(6)).double()
    other.load_state_dict({**m.state_dict(), "_extra_state": torch.tensor([0.0, 0.0], dtype=torch.float64)})
    torch.testing.assert_close(m(x), other(x))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="similarity must be one of sigmoid, elu"):
        make(similarity="tanh")
    with pytest.raises(TypeError, match="Elementwise"):
        make(similarity=torch.sigmoid)
