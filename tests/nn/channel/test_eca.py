"""Efficient channel attention: the equation, what a gate depends on, the kernel rule, and timm's module as a peer."""

import pytest
import torch
from torch import nn

from attnlab.nn.channel.eca import EfficientChannelAttention, adaptive_kernel


def oracle(m: EfficientChannelAttention, x: torch.Tensor) -> torch.Tensor:
    """The equation, channel by channel."""
    y, reach = torch.empty_like(x), m.kernel // 2
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            score = 0.0
            for j in range(m.kernel):
                neighbour = c + j - reach
                if 0 <= neighbour < x.shape[1]:
                    score += m.weight[0 if m.shared else c, 0, j].item() * x[b, neighbour].mean().item()
            y[b, c] = x[b, c] / (1 + torch.tensor(-score, dtype=x.dtype).exp())
    return y


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("kernel", "size"), [(1, (4, 5)), (3, (4, 5)), (5, (7,)), (7, (2, 3, 2)), (15, (4, 5))])
def test_is_its_equation(kernel, size, shared):
    module = EfficientChannelAttention(9, kernel=kernel, shared=shared).double()
    x = torch.randn(2, 9, *size, dtype=torch.float64)
    torch.testing.assert_close(module(x), oracle(module, x))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_gate_depends_on_the_kernels_channels_alone(kernel, shared):
    module = EfficientChannelAttention(11, kernel=kernel, shared=shared)
    x = torch.randn(1, 11, 3, 3)
    jacobian = torch.autograd.functional.jacobian(lambda t: module.gate(t)[0], x)[:, 0].abs().sum((2, 3)) > 0
    channel = torch.arange(11)
    assert torch.equal(jacobian, (channel[:, None] - channel).abs() <= kernel // 2)


def test_permuting_places_commutes():
    module, x = EfficientChannelAttention(8, kernel=3).double(), torch.randn(2, 8, 12, dtype=torch.float64)
    order = torch.randperm(12)
    torch.testing.assert_close(module(x[..., order]), module(x)[..., order])


def test_zero_weights_halve_the_input():
    module, x = EfficientChannelAttention(8, kernel=3), torch.randn(2, 8, 4, 4)
    nn.init.zeros_(module.weight)
    assert torch.equal(module(x), x / 2)


def test_shared_weights_are_the_ablation_with_equal_rows():
    shared = EfficientChannelAttention(8, kernel=3).double()
    own = EfficientChannelAttention(8, kernel=3, shared=False).double()
    own.load_state_dict({"weight": shared.weight.detach().expand(8, 1, 3)})
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(own(x), shared(x))


def test_parameters_are_k_or_c_times_k():
    assert sum(p.numel() for p in EfficientChannelAttention(64, kernel=5).parameters()) == 5
    assert sum(p.numel() for p in EfficientChannelAttention(64, kernel=5, shared=False).parameters()) == 320


def test_adaptive_kernel_is_the_papers_closed_form():
    # ψ(C) = the nearest odd to |log₂C / 2 + 1/2|, ties upward; the widths of ResNet-50's stages give 5, 5, 5, 7.
    assert [adaptive_kernel(c) for c in (256, 512, 1024, 2048)] == [5, 5, 5, 7]
    assert [adaptive_kernel(c) for c in (1, 2, 8, 16, 64, 128)] == [1, 1, 3, 3, 3, 5]
    for c in range(1, 3000, 37):
        exact, found = abs((torch.tensor(float(c)).log2().item() + 1) / 2), adaptive_kernel(c)
        assert found % 2 == 1
        assert abs(found - exact) <= 1
    assert EfficientChannelAttention(2048).kernel == 7


@pytest.mark.parametrize("kernel", [3, 7, None])
def test_equals_timms_module(timm, kernel):
    from timm.layers import EcaModule

    ours = EfficientChannelAttention(512, kernel=kernel)
    peer = EcaModule(512) if kernel is None else EcaModule(kernel_size=kernel)  # timm takes one or the other
    ours.load_state_dict({"weight": peer.conv.weight})
    x = torch.randn(2, 512, 5, 7, requires_grad=True)
    torch.testing.assert_close(ours(x), peer(x))
    torch.testing.assert_close(*(torch.autograd.grad(m(x).pow(2).sum(), x)[0] for m in (ours, peer)))


def test_bad_arguments_and_inputs_are_named():
    with pytest.raises(ValueError, match="kernel must be odd and at least 1, got 4"):
        EfficientChannelAttention(8, kernel=4)
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        EfficientChannelAttention(0)
    with pytest.raises(ValueError, match=r"x must be \(B, 8, \*spatial\) and not empty, got \(2, 7, 4, 4\)"):
        EfficientChannelAttention(8)(torch.randn(2, 7, 4, 4))
