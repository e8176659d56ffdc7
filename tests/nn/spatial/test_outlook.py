"""Outlook attention: the oracle in plain loops, and the properties that make it what it is."""

import math

import pytest
import torch
from torch import Tensor

from attnlab.nn.spatial.outlook import Fold, OutlookAttention, Unfold


def oracle(m: OutlookAttention, maps: Tensor) -> Tensor:
    """Window by window, slot by slot: maps (B, H, W, C) → (B, H·W, C)."""
    _, height, width, channels = maps.shape
    k, s, p, size = m.kernel, m.stride, m.padding, channels // m.heads
    values, out = m.wv(maps), torch.zeros_like(maps)
    for i in range(math.ceil(height / s)):
        for j in range(math.ceil(width / s)):
            centre = maps[:, i * s : (i + 1) * s, j * s : (j + 1) * s].mean((1, 2))
            scores = m.attn(centre).unflatten(-1, (k * k, m.heads, k * k)) * m.scale  # value, head, out
            weights = scores.softmax(1)
            slots = [(i * s - p + a, j * s - p + b) for a in range(k) for b in range(k)]
            for head in range(m.heads):
                part = slice(head * size, (head + 1) * size)
                for o, (y, x) in enumerate(slots):
                    if not (0 <= y < height and 0 <= x < width):
                        continue
                    for v, (vy, vx) in enumerate(slots):
                        if 0 <= vy < height and 0 <= vx < width:
                            out[:, y, x, part] += weights[:, v, head, o, None] * values[:, vy, vx, part]
    return m.wo(out).flatten(1, 2)


@pytest.mark.parametrize(
    ("grid", "kernel", "stride"), [((4, 5), 3, 1), ((5, 3), 3, 2), ((4, 4), 3, 2), ((5, 7), 5, 3), ((1, 2), 3, 2)]
)
def test_equals_the_loops(grid: tuple[int, int], kernel: int, stride: int) -> None:
    m = OutlookAttention(4, heads=2, kernel=kernel, stride=stride, bias=True).double()
    maps = torch.randn(2, *grid, 4, dtype=torch.float64)
    torch.testing.assert_close(m(maps.flatten(1, 2), grid=grid), oracle(m, maps))


@pytest.mark.parametrize(("grid", "kernel", "stride"), [((5, 6), 3, 2), ((4, 4), 5, 1), ((3, 7), 3, 3)])
def test_fold_is_the_adjoint_of_unfold(grid: tuple[int, int], kernel: int, stride: int) -> None:
    x = torch.randn(2, *grid, 6, dtype=torch.float64)
    windows = Unfold.apply(x, 3, kernel, stride, kernel // 2)
    w = torch.randn_like(windows)
    torch.testing.assert_close((windows * w).sum(), (x * Fold.apply(w, grid, kernel, stride, kernel // 2)).sum())


def test_gradients_of_first_and_second_order_are_right() -> None:
    m = OutlookAttention(2, heads=1, stride=2).double()
    x = torch.randn(1, 9, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: m(t, grid=(3, 3)), x)
    assert torch.autograd.gradgradcheck(lambda t: m(t, grid=(3, 3)), x)


def test_predicted_weights_sum_to_one() -> None:
    m = OutlookAttention(8, heads=2, stride=2)
    weights = m.weights(torch.randn(2, 5, 6, 8))
    assert weights.shape == (2, 3, 3, 2, 9, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 3, 2, 9))


def test_uniform_weights_give_the_overlap_sum_of_window_means() -> None:
    m = OutlookAttention(4, heads=2).double()
    with torch.no_grad():
        for layer in (m.wv, m.wo):
            layer.weight.copy_(torch.eye(4))
        m.wo.bias.zero_()
        m.attn.weight.zero_()
        m.attn.bias.zero_()
    maps = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    means = torch.nn.functional.avg_pool2d(maps, 3, 1, 1)  # zeros outside count, as values outside do
    sums = torch.nn.functional.avg_pool2d(means, 3, 1, 1) * 9
    torch.testing.assert_close(m(maps.flatten(2).transpose(1, 2), grid=(6, 6)), sums.flatten(2).transpose(1, 2))


def test_without_the_predictor_it_is_linear_for_no_query_meets_a_key() -> None:
    m = OutlookAttention(4, heads=2).double()
    torch.nn.init.zeros_(m.attn.weight)
    torch.nn.init.zeros_(m.wo.bias)
    a, b = torch.randn(2, 1, 12, 4, dtype=torch.float64)
    torch.testing.assert_close(m(2 * a - 3 * b, grid=(3, 4)), 2 * m(a, grid=(3, 4)) - 3 * m(b, grid=(3, 4)))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="causal"):
        OutlookAttention(8, heads=2, causal=True)
    with pytest.raises(ValueError, match="heads"):
        OutlookAttention(8, heads=3)
    with pytest.raises(ValueError, match="stride"):
        OutlookAttention(8, heads=2, stride=0)
    with pytest.raises(ValueError, match="padding"):
        OutlookAttention(8, heads=2, padding=0)(torch.randn(1, 16, 8), grid=(4, 4))
    with pytest.raises(ValueError, match="context"):
        OutlookAttention(8, heads=2)(torch.randn(1, 16, 8), torch.randn(1, 4, 8), grid=(4, 4))
