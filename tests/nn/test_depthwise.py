"""Depth-wise convolutions: through residues they are the dilated convolutions that they stand for."""

import pytest
import torch
import torch.nn.functional as F

from attnlab.nn.depthwise import DepthwiseConv


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
