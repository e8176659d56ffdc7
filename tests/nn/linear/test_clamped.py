"""Clamped linear attention: both orders of multiplication, the floor under the divisor, symmetry, linear cost."""

import pytest
import torch

from attnlab.cost import count_flops, fit_growth
from attnlab.nn.linear.clamped import ClampedLinearAttention

D = torch.float64


def shaken(**options) -> ClampedLinearAttention:
    module = ClampedLinearAttention(8, heads=2, **options).to(D)
    for p in module.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return module


@pytest.mark.parametrize("floor", [1e-6, 3.0, 100.0])
def test_both_orders_of_multiplication_agree(floor):
    module, x = shaken(floor=floor), torch.randn(2, 9, 8, dtype=D)
    q, k, v = module.qkv(x)
    scores = q.relu() @ k.relu().mT
    divisor = scores.sum(-1, keepdim=True)
    assert bool((divisor > floor).any()) is (floor < 100)
    weights = scores / divisor.clamp(min=floor) * module.scale[:, None, None]
    torch.testing.assert_close(module(x), module.merge(weights @ v))
    torch.testing.assert_close(module.weights(x), weights)


def test_above_the_floor_weights_sum_to_the_scale_and_below_to_less():
    module, x = shaken(floor=2.0), torch.randn(4, 9, 8, dtype=D)
    q, k, _ = module.qkv(x)
    total = (q.relu() @ k.relu().mT).sum(-1)
    shares = module.weights(x).sum(-1) / module.scale[:, None]
    above = total >= 2
    assert above.any() and not above.all()
    torch.testing.assert_close(shares[above], torch.ones_like(shares[above]))
    torch.testing.assert_close(shares[~above], total[~above] / 2)


def test_starts_as_the_authors_do():
    module = ClampedLinearAttention(32, heads=2)
    assert module.floor == 100 and bool((module.scale == 0.25).all())


def test_tokens_may_change_places():
    module, x, order = shaken(), torch.randn(2, 9, 8, dtype=D), torch.randperm(9)
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])


def test_costs_linearly():
    module, lengths = ClampedLinearAttention(16, heads=2), (256, 1024, 4096)
    with torch.no_grad():
        counts = [count_flops(module, torch.randn(1, n, 16)) for n in lengths]
    assert fit_growth(lengths, counts) == pytest.approx(1.0, abs=0.01)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="floor must be positive, got 0"):
        ClampedLinearAttention(8, heads=2, floor=0.0)
