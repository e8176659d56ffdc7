"""cosFormer: all pairs by hand, what is near weighs more, and where its length ends."""

import math

import pytest
import torch
from torch import Tensor

from attnlab.nn.linear.cosformer import CosFormer

D = torch.float64


def by_hand(m: CosFormer, x: Tensor, context: Tensor) -> Tensor:
    (q, _, _), (_, k, v) = m.qkv(x), m.qkv(context)
    n, nk = x.shape[1], context.shape[1]
    distance = torch.arange(n)[:, None] - torch.arange(nk)
    pairs = q.relu() @ k.relu().mT * (math.pi / 2 * distance.to(D) / (m.length or max(n, nk))).cos()
    if m.causal:
        pairs = pairs.masked_fill(distance < 0, 0.0)
    return m.merge(pairs / pairs.sum(-1, keepdim=True).clamp_min(1e-6) @ v)


@pytest.mark.parametrize(("length", "causal"), [(None, False), (64, False), (64, True)])
def test_equals_all_pairs(length: int | None, causal: bool) -> None:
    m = CosFormer(16, heads=2, length=length, causal=causal).double()
    x, context = torch.randn(2, 23, 16, dtype=D), torch.randn(2, 31, 16, dtype=D)
    torch.testing.assert_close(m(x), by_hand(m, x, x))
    torch.testing.assert_close(m(x, context), by_hand(m, x, context))


def test_what_is_near_weighs_more() -> None:
    """The same token everywhere: weights fall with distance, as a cosine."""
    m = CosFormer(8, heads=2, length=32).double()
    torch.nn.init.constant_(m.wqkv.weight, 0.1)  # nothing is left out by relu
    weights = m.weights(torch.ones(1, 32, 8, dtype=D)).detach()[0, 0]
    assert (weights[0].diff() < 0).all() and weights[0, 16] / weights[0, 0] == pytest.approx(math.cos(math.pi / 4))


def test_causal_outputs_do_not_depend_on_how_long_the_text_becomes() -> None:
    m, x = CosFormer(16, heads=2, length=64, causal=True).double(), torch.randn(1, 40, 16, dtype=D)
    torch.testing.assert_close(m(x)[:, :10], m(x[:, :10]))


def test_it_ends_at_its_length_and_says_so() -> None:
    assert CosFormer(16, causal=True).length == 8192 and CosFormer(16).length is None
    m = CosFormer(16, length=8, causal=True)
    with pytest.raises(ValueError, match="beyond length=8"):
        m(torch.randn(1, 9, 16))
    _, state = m(torch.randn(1, 6, 16), state=m.initial_state(1))
    with pytest.raises(ValueError, match="got 9"):
        m(torch.randn(1, 3, 16), state=state)


def test_padding_has_no_influence() -> None:
    m, x = CosFormer(16, heads=2).double(), torch.randn(2, 12, 16, dtype=D)
    keep = torch.arange(12).expand(2, 12) < 9
    other = torch.where(keep[..., None], x, torch.randn_like(x))
    torch.testing.assert_close(m(x, other, keep=keep), m(x, x, keep=keep))
