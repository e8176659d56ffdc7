"""One pass equals a linear layer and its activation, and steps aside wherever somebody would notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

from attnlab.cost import count_flops
from attnlab.nn.fused import linear, product

ACTIVATIONS = [None, nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.SiLU()]
KERNEL = "mkldnn::_linear_pointwise"

needs_kernel = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="torch has no oneDNN here",
)


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 128)


X = torch.randn(2, 300, 16, generator=torch.Generator().manual_seed(1))


def fuses(call: Callable[[], object]) -> bool:
    with profile() as seen:
        call()
    return any(event.key == KERNEL for event in seen.key_averages())


@needs_kernel
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@torch.no_grad()
def test_one_pass_equals_the_layer_and_its_activation(layer: nn.Linear, activation: nn.Module | None) -> None:
    wanted = layer(X) if activation is None else activation(layer(X))
    assert fuses(lambda: linear(X, layer, activation))
    torch.testing.assert_close(linear(X, layer, activation), wanted)


@needs_kernel
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_maps_that_do_not_lie_together_are_taken_too(layer: nn.Linear, bias: bool) -> None:
    x = torch.randn(16, 302, 2).permute(2, 1, 0)[:, 1:]
    given = layer.weight, layer.bias if bias else None
    assert fuses(lambda: product(x, *given))
    torch.testing.assert_close(product(x, *given), torch.nn.functional.linear(x, *given))


def test_it_is_not_taken_where_gradients_are_recorded(layer: nn.Linear) -> None:
    assert not fuses(lambda: linear(X, layer, nn.GELU()))
    linear(X, layer, nn.GELU()).sum().backward()
    assert layer.weight.grad is not None


@torch.no_grad()
def test_it_is_not_taken_where_somebody_would_notice(layer: nn.Linear) -> None:
    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    adapter = Adapter(16, 128)
    torch.testing.assert_close(linear(X, adapter, nn.GELU()), nn.functional.gelu(adapter(X)))
    assert not fuses(lambda: linear(X, layer, nn.Tanh()))
    assert not fuses(lambda: linear(X.double(), layer.double()))
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(X, layer).dtype is torch.bfloat16
    for hooked in (layer, activation := nn.GELU()):
        handle = hooked.register_forward_hook(lambda _, __, y: y * 0 + 3)
        assert not fuses(lambda: linear(X, layer, activation))
        assert linear(X, layer, activation).unique().numel() == 1
        handle.remove()


@torch.no_grad()
def test_its_operations_are_counted(layer: nn.Linear) -> None:
    assert count_flops(linear, X, layer, nn.GELU()) == 2 * 600 * 16 * 128
