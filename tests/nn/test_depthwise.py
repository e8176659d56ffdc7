"""Depth-wise convolutions: through residues they are the dilated convolutions that they stand for."""

import pytest
import torch
import torch.nn.functional as F

from attnlab.nn.depthwise import DepthwiseConv, depthwise


@pytest.mark.parametrize("size", [(1, 1), (4, 11), (13, 9)])
@pytest.mark.parametrize(("kernel", "dilation"), [(7, 3), (3, 5), (5, 2), (5, 1), (1, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_torchs_dilated_convolution(size, kernel, dilation, bias):
    conv = DepthwiseConv(3, kernel, dilation=dilation, bias=bias).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    wanted = F.conv2d(x, conv.weight, conv.bias, 1, dilation * (kernel // 2), dilation, 3)
    torch.testing.assert_close(conv(x), wanted)
    inputs = [x, *conv.parameters()]
    ours, theirs = (torch.autograd.grad(y.pow(3).sum(), inputs) for y in (conv(x), wanted))
    torch.testing.assert_close(ours, theirs)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="kernel must be odd, to keep the map's size, got 4"):
        DepthwiseConv(3, 4)
    with pytest.raises(ValueError, match="dilation must be at least 1, got 0"):
        DepthwiseConv(3, 3, dilation=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel", "size"), [(5, (4, 11)), (7, (13, 9)), (9, (2, 3))])
def test_gradients_by_strips_are_the_convolutions_own(kernel, size, layout):
    x = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weight, bias = torch.randn(3, 1, kernel, kernel, dtype=torch.float64, requires_grad=True), torch.randn(3).double()
    inputs = [x, weight, bias.requires_grad_()]
    ours, theirs = depthwise(*inputs), F.conv2d(x, weight, bias, padding=kernel // 2, groups=3)
    torch.testing.assert_close(ours, theirs)
    for mine, wanted in zip(*(torch.autograd.grad(y.pow(3).sum(), inputs) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_gradients_by_strips_have_gradients():
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 3, 4), (2, 1, 5, 5)))
    assert torch.autograd.gradgradcheck(depthwise, (x, weight))


def test_weights_of_samples_apart():
    x, weight = torch.randn(3, 1, 2, 5, 6), torch.randn(2, 1, 5, 5)
    each = torch.func.vmap(torch.func.grad(lambda w, x: depthwise(x, w).square().sum()), (None, 0))(weight, x)
    whole = torch.func.grad(lambda w: depthwise(x[:, 0], w).square().sum())(weight)
    torch.testing.assert_close(each.sum(0), whole)
