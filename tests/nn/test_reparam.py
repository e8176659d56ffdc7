"""Re-parameterised large kernels: merged they are the branches' sum, whatever their sizes and dilations."""

import pytest
import torch
from torch import nn

from attnlab.nn.reparam import BRANCHES, DilatedReparam


def shaken(module: nn.Module) -> nn.Module:
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if "running_var" in name else nn.init.normal_(tensor, std=0.5)
    return module.double().eval()


@pytest.mark.parametrize("kernel", BRANCHES)
@pytest.mark.parametrize("norm", [False, True])
def test_merged_it_is_the_sum_of_its_branches(kernel, norm):
    module = shaken(DilatedReparam(3, kernel, norm=norm))
    x = torch.randn(1, 3, 9, 12, dtype=torch.float64)
    wanted = sum(branch(x) for branch in module.branches.values()) + module.large(x)
    wanted = wanted if module.last is None else module.last(wanted)
    torch.testing.assert_close(module(x), wanted, rtol=1e-9, atol=1e-9)
    module.fuse()
    assert [n for n, _ in module.named_parameters()] == ["large.weight", "large.bias"]
    torch.testing.assert_close(module(x), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(module.train()(x), wanted, rtol=1e-9, atol=1e-9)


def test_every_branch_fits_into_the_large_kernel():
    assert all((k - 1) * r + 1 <= kernel for kernel, branches in BRANCHES.items() for k, r in branches)


def test_gradients_reach_every_branch_through_the_merged_kernel():
    module = shaken(DilatedReparam(2, 7))
    module(torch.randn(1, 2, 8, 8, dtype=torch.float64)).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="kernel must be one of 5, 7, 9, 11, 13, 15, 17, 19, got 3"):
        DilatedReparam(4, 3)
    with pytest.raises(ValueError, match=r"fuse needs eval\(\)"):
        DilatedReparam(4, 5).fuse()
