"""One query at a time, against the operator's oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab import attend
from attnlab.nn.decode import attend_one, visible
from attnlab.patterns import Causal, Explicit, PowersOfTwo, Window
from attnlab.positions import ALiBi, BucketBias
from attnlab.weightings import Relu, Sigmoid, Softmax


def sample(keys: int = 20, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, 4, 1, 6, dtype=torch.float64)
    k, v = (torch.randn(2, kv_heads, keys, d, dtype=torch.float64) for d in (6, 5))
    return q, k, v


BIASES = {
    "none": None,
    "tensor": torch.randn(4, 1, 20, dtype=torch.float64),
    "function": ALiBi(4).bias(1, 20, 19),
    "lookup": BucketBias(4).double().bias(1, 20, 19),
}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("weighting", [Softmax(), Softmax(1.0), Sigmoid(), Sigmoid(-1.0), Relu(2)], ids=str)
def test_equals_the_oracle(weighting, bias: str, kv_heads: int) -> None:
    q, k, v = sample(kv_heads=kv_heads)
    how = dict(weighting=weighting, bias=BIASES[bias], scale=0.3)
    torch.testing.assert_close(attend_one([(q, k, v)], **how), attend(q, k, v, backend="reference", **how))


@pytest.mark.parametrize("bias", BIASES)
def test_stretches_equal_one_call_over_their_keys(bias: str) -> None:
    q, k, v = sample()
    at = torch.tensor([0, 1, 2, 7, 8, 15])
    parts = [(q, k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 3), (7, 9), (15, 16))]
    seen = torch.zeros(1, 20, dtype=torch.bool)
    seen[:, at] = True
    wanted = attend(q, k, v, pattern=Explicit(seen), bias=BIASES[bias], backend="reference")
    torch.testing.assert_close(attend_one(parts, bias=BIASES[bias], at=at), wanted)


def test_each_stretch_may_have_its_own_query() -> None:
    q, k, v = sample()
    other = torch.randn_like(q)
    scores = torch.cat((q @ k[:, :, :4].repeat_interleave(2, 1).mT, other @ k[:, :, 4:].repeat_interleave(2, 1).mT), -1)
    wanted = (scores / 6**0.5).softmax(-1) @ v.repeat_interleave(2, 1)
    ours = attend_one([(q, k[:, :, :4], v[:, :, :4]), (other, k[:, :, 4:], v[:, :, 4:])])
    torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("pattern", [Causal(), Window(5), PowersOfTwo(block=2, window=1)], ids=str)
def test_visible_keys_are_those_of_the_patterns_row(pattern) -> None:
    assert torch.equal(
        visible(pattern.starting_at(15), 20, torch.device("cpu")), pattern.matrix(20)[15].nonzero().squeeze(-1)
    )


def test_dropout_drops_weights() -> None:
    q, k, v = sample()
    assert not torch.equal(
        attend_one([(q, k, v)], bias=BIASES["tensor"], dropout=0.5), attend_one([(q, k, v)], bias=BIASES["tensor"])
    )
