"""Recursive gated convolutions: the equations written out, their degree, their cost, and what products they learn."""

import pytest
import torch
from torch import nn

from attnlab.cost import count_flops
from attnlab.nn.spatial.gated_conv import GlobalLocalFilter, RecursiveGatedConv


def pointwise(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("dc,bchw->bdhw", layer.weight, x) + layer.bias[:, None, None]


@pytest.mark.parametrize("order", [1, 2, 4])
def test_equals_the_recursion_written_out(order):
    conv = RecursiveGatedConv(16, order=order, scale=0.4).double()
    x = torch.randn(2, 16, 5, 9, dtype=torch.float64)
    widths = [16 // 2**i for i in reversed(range(order))]
    fused = pointwise(conv.wi, x)
    p, q = fused[:, : widths[0]], fused[:, widths[0] :]
    weight, q = conv.filter.weight[:, 0], nn.functional.pad(q, (3, 3, 3, 3))
    filtered = conv.filter.bias[:, None, None] + sum(
        weight[:, a, b, None, None] * q[:, :, a : a + 5, b : b + 9] for a in range(7) for b in range(7)
    )
    parts = (0.4 * filtered).split(widths, 1)
    p = p * parts[0]
    for step, part in zip(conv.steps, parts[1:], strict=True):
        p = pointwise(step, p) * part
    torch.testing.assert_close(conv(x), pointwise(conv.wo, p))


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_without_biases_it_is_homogeneous_of_one_degree_more_than_its_order(order):
    conv = RecursiveGatedConv(16, order=order).double()
    for name, p in conv.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
    x = torch.randn(1, 16, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(conv(1.7 * x), 1.7 ** (order + 1) * conv(x))


def test_with_a_filter_of_zero_only_the_last_bias_is_left():
    conv = RecursiveGatedConv(8, order=3)
    nn.init.zeros_(conv.filter.weight)
    nn.init.zeros_(conv.filter.bias)
    torch.testing.assert_close(conv(torch.randn(1, 8, 6, 6)), conv.wo.bias[:, None, None].expand(1, 8, 6, 6))


def test_higher_orders_cost_about_the_same():
    x = torch.randn(1, 64, 14, 14)
    costs = [count_flops(RecursiveGatedConv(64, order=order), x) for order in range(2, 6)]
    assert max(costs) < 1.12 * min(costs)
    assert max(costs) / 2 <= 196 * 64 * (11 * 64 / 3 + 2 * 49)


def test_it_moves_with_the_map():
    x = torch.randn(1, 8, 24, 20, dtype=torch.float64)
    conv = RecursiveGatedConv(8, order=2).double()
    moved = conv(x.roll((3, 2), (2, 3)))
    torch.testing.assert_close(moved[..., 6:-6, 6:-6], conv(x).roll((3, 2), (2, 3))[..., 6:-6, 6:-6])


def test_the_global_filter_is_a_circular_convolution():
    layer = GlobalLocalFilter(4, spectrum=(5, 4)).double()
    nn.init.normal_(layer.filter)
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    kernel = torch.fft.irfft2(torch.view_as_complex(layer.filter.detach()), s=(5, 6))
    wanted = torch.zeros_like(x)
    for a in range(5):
        for b in range(6):
            wanted += kernel[:, a, b, None, None] * x.roll((a, b), (2, 3))
    torch.testing.assert_close(layer.circular(x), wanted)


def test_local_and_global_channels_alternate():
    layer, x = GlobalLocalFilter(6, spectrum=(4, 3)).double(), torch.randn(2, 6, 4, 4, dtype=torch.float64)
    nn.init.normal_(layer.filter)
    normed = layer.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    local, everywhere = layer.local(normed[:, :3]), layer.circular(normed[:, 3:])
    order = [m for pair in zip(local.unbind(1), everywhere.unbind(1), strict=True) for m in pair]
    y = torch.stack(order, -1)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(layer(x), y.permute(0, 3, 1, 2))
    torch.testing.assert_close(layer(x, scale=0.3), 0.3 * layer(x))


def test_the_product_of_three_places_is_learned_by_order_three_and_not_by_order_one():
    def left(order):
        """The share of the variance that is not explained after training."""
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 16, 1), RecursiveGatedConv(16, order=order, scale=1.0), nn.Conv2d(16, 1, 1))
        optimizer, late = torch.optim.Adam(net.parameters(), 0.02), []
        for step in range(200):
            signs = torch.randn(16, 1, 8, 8).sign()
            target = signs[..., :-4] * signs[..., 2:-2] * signs[..., 4:]
            loss = (net(signs)[..., 2:-2] - target).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step >= 190:
                late.append(loss.item())
        return sum(late) / len(late)

    assert left(3) < 0.2
    assert left(1) > 0.9


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"dim a multiple of 2\^\(order - 1\), got 4 and 12"):
        RecursiveGatedConv(12, order=4)
    with pytest.raises(ValueError, match="dim must be even, got 5"):
        GlobalLocalFilter(5)
    with pytest.raises(ValueError, match=r"spectrum must be two positive integers, got \(0, 3\)"):
        GlobalLocalFilter(4, spectrum=(0, 3))
    with pytest.raises(ValueError, match=r"x must be \(B, 8, H, W\)"):
        RecursiveGatedConv(8)(torch.randn(1, 4, 5, 5))
