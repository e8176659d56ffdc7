"""Counted FLOPs are those of the arithmetic, on the CPU's own kernels too; fitted growth is the exponent."""

import pytest
import torch
import torch.nn.functional as F

from attnlab import attend
from attnlab.cost import Cost, count_flops, fit_growth, machine
from attnlab.patterns import Causal, Window


def heads(tokens=64, dim=16, **keywords):
    return [torch.randn(2, 3, tokens, dim, **keywords) for _ in range(3)]


def test_a_product_takes_two_flops_per_multiply_and_add():
    a, b = torch.randn(5, 7), torch.randn(7, 11)
    assert count_flops(torch.matmul, a, b) == 2 * 5 * 7 * 11
    assert count_flops(lambda: F.linear(a, torch.randn(3, 7))) == 2 * 5 * 7 * 3


def test_attention_counts_both_products_whichever_kernel_runs_it():
    q, k, v = heads()
    wanted = 2 * 2 * 3 * 64 * 64 * (16 + 16)
    assert count_flops(F.scaled_dot_product_attention, q, k, v) == wanted
    for backend in ("dense", "reference"):
        assert count_flops(attend, q, k, v, pattern=Causal(), backend=backend) == wanted
    assert count_flops(attend, q, k, v[..., :4], backend="dense") == 2 * 2 * 3 * 64 * 64 * (16 + 4)


def test_a_backward_recomputes_the_scores_and_makes_four_gradients():
    q, k, v = heads(requires_grad=True)

    def train():
        F.scaled_dot_product_attention(q, k, v).sum().backward()

    assert count_flops(train) == 2 * 2 * 3 * 64 * 64 * (16 + 16) * 7 // 2


def test_windows_count_what_their_tiles_compute():
    counts = [count_flops(attend, *heads(n), pattern=Window(32), backend="tiles") for n in (1024, 2048, 4096)]
    assert fit_growth([1024, 2048, 4096], counts) == pytest.approx(1.0, abs=0.02)
    dense = [count_flops(attend, *heads(n), pattern=Window(32), backend="dense") for n in (128, 256, 512)]
    assert fit_growth([128, 256, 512], dense) == pytest.approx(2.0, abs=1e-9)


def test_fitted_growth_is_the_slope_in_logarithms():
    sizes = [10, 20, 40, 80]
    assert fit_growth(sizes, [3 * s**1.7 for s in sizes]) == pytest.approx(1.7)
    with pytest.raises(ValueError, match="same length of at least 2, got 1 and 1"):
        fit_growth([1], [1])
    with pytest.raises(ValueError, match="same length of at least 2, got 2 and 3"):
        fit_growth([1, 2], [1, 2, 3])


def test_a_prediction_adds_up_arithmetic_traffic_and_calls():
    cpu = machine(torch.device("cpu"))
    one = cpu.cost("fused", 1e6, 64)
    assert one == Cost(flops=1.28e8, bytes=0.0, seconds=one.seconds, memory=0.0)
    assert cpu.cost("fused", 2e6, 64, calls=2).seconds == pytest.approx(2 * one.seconds)
    assert cpu.cost("fused", 1e6, 64, train=True, calls=3.5).seconds == pytest.approx(3.5 * one.seconds)
    moved = cpu.cost("fused", 1e6, 64, moved=cpu.bandwidth)
    assert moved.seconds == pytest.approx(one.seconds + 1) and moved.bytes == cpu.bandwidth
    assert cpu.cost("fused", 1e6, 64, dtype=torch.float64).seconds > one.seconds
    assert machine(torch.device("cuda")).cost("fused", 1e9, 64).seconds < cpu.cost("fused", 1e9, 64).seconds / 100


def test_more_threads_are_predicted_to_be_faster():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = machine(torch.device("cpu")).cost("fused", 1e9, 64).seconds
        torch.set_num_threads(2)
        assert machine(torch.device("cpu")).cost("fused", 1e9, 64).seconds == pytest.approx(one / 2, rel=1e-3)
    finally:
        torch.set_num_threads(before)
