"""Clamped linear attention: both orders of multiplication, the floor under the divisor, symmetry, linear cost."""

import pytest
import torch

from attnlab.cost import count_flops, fit_growth
from attnlab.nn.linear.clamped import ClampedLinearAttention
from attnlab.nn.multihead import MultiHead

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


def test_rows_stay_as_flat_however_large_queries_and_keys_are_and_softmax_rows_do_not():
    def entropy(rows: torch.Tensor) -> float:
        rows = rows / rows.sum(-1, keepdim=True)
        return -torch.special.xlogy(rows, rows).sum(-1).mean().item()

    module, full = ClampedLinearAttention(64, heads=2, floor=1e-6).to(D), MultiHead(64, heads=2, bias=True).to(D)
    x, flat, sharp = torch.randn(2, 100, 64, dtype=D), [], []
    for deviation in (0.03, 0.12, 0.2):  # scores spread by 0.1, 1 and 3, as before training, early and late in it
        torch.manual_seed(0)
        torch.nn.init.normal_(module.wqkv.weight, std=deviation)
        torch.nn.init.zeros_(module.wqkv.bias)
        full.load_state_dict(module.state_dict(), strict=False)
        flat.append(entropy(module.weights(x)))
        sharp.append(entropy(full.weights(x)))
    assert flat == pytest.approx([flat[0]] * 3)
    assert sharp[0] > flat[0] > 4.4  # log 100 = 4.6: at first, softmax is the flatter of the two
    assert flat[0] > sharp[1] > sharp[2] + 1


def test_costs_linearly():
    module, lengths = ClampedLinearAttention(16, heads=2), (256, 1024, 4096)
    with torch.no_grad():
        counts = [count_flops(module, torch.randn(1, n, 16)) for n in lengths]
    assert fit_growth(lengths, counts) == pytest.approx(1.0, abs=0.01)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="floor must be positive, got 0"):
        ClampedLinearAttention(8, heads=2, floor=0.0)
