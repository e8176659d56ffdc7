"""Large kernel attention: its reach, its gate, and what a 7×7 kernel is too small for."""

import pytest
import torch
from torch import nn

from attnlab.nn.spatial.large_kernel import LargeKernelAttention, LargeKernelMixer


def test_equals_the_convolutions_written_out():
    lka = LargeKernelAttention(3, kernel=9, dilation=2).double()
    x = torch.randn(1, 3, 6, 7, dtype=torch.float64)

    def slow(x, weight, bias, dilation):
        half, y = weight.shape[-1] // 2, torch.zeros_like(x)
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                for a in range(weight.shape[-1]):
                    for b in range(weight.shape[-1]):
                        row, column = i + (a - half) * dilation, j + (b - half) * dilation
                        if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                            y[:, :, i, j] += weight[:, 0, a, b] * x[:, :, row, column]
        return y + bias[:, None, None]

    y = slow(slow(x, lka.near.weight, lka.near.bias, 1), lka.far.weight, lka.far.bias, 2)
    gate = torch.einsum("dc,bchw->bdhw", lka.wm.weight, y) + lka.wm.bias[:, None, None]
    torch.testing.assert_close(lka(x), x * gate)


def test_the_gate_sees_23_by_23_places_without_holes():
    lka, x = LargeKernelAttention(2).double(), torch.randn(1, 2, 31, 33, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(lka.gate(x)[0, 0, 15, 16], x)
    seen = gradient[0, 0] != 0
    wanted = torch.zeros_like(seen)
    wanted[4:27, 5:28] = True
    assert torch.equal(seen, wanted)


def test_it_is_the_map_times_an_affine_function_of_it():
    lka = LargeKernelAttention(4).double()
    x, z = torch.randn(2, 1, 4, 9, 8, dtype=torch.float64)
    assert not lka(torch.zeros_like(x)).any()
    middle = lka.gate(0.25 * x + 0.75 * z)
    torch.testing.assert_close(middle, 0.25 * lka.gate(x) + 0.75 * lka.gate(z))


def test_with_a_gate_of_one_it_is_the_identity():
    lka, x = LargeKernelAttention(4), torch.randn(1, 4, 9, 8)
    nn.init.zeros_(lka.wm.weight)
    nn.init.ones_(lka.wm.bias)
    assert torch.equal(lka(x), x)


def test_parameters_are_those_of_the_decomposition():
    for kernel, dilation in ((21, 3), (7, 1), (35, 5), (13, 2)):
        dim, far = 6, -(-kernel // dilation)
        count = sum(p.numel() for p in LargeKernelAttention(dim, kernel=kernel, dilation=dilation).parameters())
        assert count == dim * (far**2 + (2 * dilation - 1) ** 2 + dim) + 3 * dim


def test_it_reads_a_cue_eight_places_away_where_a_kernel_of_seven_cannot():
    def left(mixer):
        """The share of the variance that is not explained after training."""
        torch.manual_seed(0)
        head = nn.Conv2d(8, 1, 1)
        optimizer = torch.optim.Adam([*mixer.parameters(), *head.parameters()], 0.01)
        for _ in range(150):
            x = torch.zeros(8, 8, 16, 16)
            x[:, 0], x[:, 1] = torch.rand(8, 16, 16) < 0.3, torch.randn(8, 16, 16).sign()
            target = x[:, 0, :, :8] * x[:, 1, :, 8:]  # at a mark, the sign eight places to the right
            loss = (head(mixer(x))[:, 0, :, :8] - target).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (loss / target.pow(2).mean()).item()

    torch.manual_seed(0)
    assert left(LargeKernelMixer(8)) < 0.35
    assert left(LargeKernelMixer(8, kernel=7, dilation=1)) > 0.9


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="kernel must be an odd number of dilations, rounded up, got 12 / 3"):
        LargeKernelAttention(4, kernel=12)
    with pytest.raises(ValueError, match="kernel and dilation must be at least 1, got 21 and 0"):
        LargeKernelAttention(4, dilation=0)
    with pytest.raises(ValueError, match=r"x must be \(B, 4, H, W\) and not empty, got \(1, 3, 5, 5\)"):
        LargeKernelMixer(4)(torch.randn(1, 3, 5, 5))
