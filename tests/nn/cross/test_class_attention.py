"""Class attention: a summary token over itself and the places."""

import pytest
import torch

from attnlab.cost import count_flops, fit_growth
from attnlab.nn.cross.class_attention import ClassAttention


def test_equals_the_formula() -> None:
    m = ClassAttention(6, heads=2, head_dim=4, bias=True).double()
    x, context = torch.randn(2, 1, 6, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    tokens = torch.cat((x, context), 1)
    q = m.wq(x).view(2, 1, 2, 4)
    k, v = m.wkv(tokens).view(2, 6, 2, 2, 4).unbind(2)
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 2).softmax(-1)
    wanted = m.wo(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
    torch.testing.assert_close(m(x, context), wanted)


def test_the_order_of_the_places_does_not_matter() -> None:
    m, x, context = ClassAttention(8, heads=2), torch.randn(1, 1, 8), torch.randn(1, 9, 8)
    torch.testing.assert_close(m(x, context[:, torch.randperm(9)]), m(x, context))


def test_cost_is_linear_in_the_number_of_places() -> None:
    m, x, sizes = ClassAttention(8, heads=2), torch.randn(1, 1, 8), (512, 1024, 2048)
    counts = [count_flops(m, x, torch.randn(1, n, 8)) for n in sizes]
    assert fit_growth(sizes, counts) == pytest.approx(1.0, abs=0.01)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="causal"):
        ClassAttention(8, heads=2, causal=True)
    with pytest.raises(ValueError, match="pattern"):
        ClassAttention(8, heads=2)(torch.randn(1, 1, 8), pattern=object())
