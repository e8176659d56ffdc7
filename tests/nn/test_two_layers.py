"""Two layers in parts equal two layers at once, in gradients of first and second order, and step aside when watched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnlab.models.skeletons.parts import MLP
from attnlab.nn import two_layers as module
from attnlab.nn.two_layers import two_layers


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WORTH", 1)
    monkeypatch.setattr(module, "_CACHED", 1)
    monkeypatch.setattr(module, "_ROWS", 5)


@pytest.fixture
def by_parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each pass that goes by parts."""
    found: list[int] = []
    parts = module._parts
    monkeypatch.setattr(module, "_parts", lambda rows, hidden: found.append(rows) or parts(rows, hidden))
    return found


def layers(bias: bool = True, activation: nn.Module | None = None) -> tuple[nn.Linear, nn.Module, nn.Linear]:
    torch.manual_seed(0)
    made = nn.Linear(6, 10, bias=bias), activation or nn.GELU(), nn.Linear(10, 4, bias=bias)
    for layer in made:
        layer.double()
    return made


def at_once(x: Tensor, fc1: nn.Linear, activation: nn.Module, fc2: nn.Linear) -> Tensor:
    return fc2(activation(fc1(x)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ReLU()])
def test_outputs_and_gradients_are_those_at_once(activation: nn.Module, bias: bool, by_parts: list[int]) -> None:
    parts, x = layers(bias, activation), torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    weights = [p for layer in parts for p in layer.parameters()]
    results = []
    for f in (two_layers, at_once):
        out = f(x.movedim(1, 2), *parts)
        with torch.no_grad():
            torch.testing.assert_close(f(x.movedim(1, 2), *parts), out)
        results.append([out, *torch.autograd.grad((out**3).sum(), [x, *weights])])
    assert len(by_parts) == 3  # inference, forward, backward
    torch.testing.assert_close(results[0], results[1])


def test_gradients_of_second_order(by_parts: list[int]) -> None:
    fc1, activation, fc2 = layers()

    def f(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return module._TwoLayers.apply(x, w1, b1, w2, b2, activation)[0]

    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)
    assert by_parts


@pytest.mark.parametrize("frozen", [("fc1",), ("fc2",), ("fc1", "fc2"), ("x",), ("x", "fc1")])
def test_only_what_is_trained_has_gradients(frozen: tuple[str, ...]) -> None:
    fc1, activation, fc2 = layers()
    x = torch.randn(12, 6, dtype=torch.float64)
    for name, thing in {"x": x, "fc1": fc1, "fc2": fc2}.items():
        thing.requires_grad_(name not in frozen)
    trained = [t for t in (x, *fc1.parameters(), *fc2.parameters()) if t.requires_grad]
    grads = [torch.autograd.grad(f(x, fc1, activation, fc2).square().sum(), trained) for f in (two_layers, at_once)]
    torch.testing.assert_close(grads[0], grads[1])


def test_it_keeps_one_hidden_map_for_the_backward() -> None:
    x, kept = torch.randn(20, 6, dtype=torch.float64, requires_grad=True), []
    parts = layers()
    for f in (two_layers, at_once):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            f(x, *parts)
        kept.append(sizes.count(20 * 10))
    assert kept == [1, 2]


def test_hooks_wrapped_layers_and_transforms_see_the_layers(by_parts: list[int]) -> None:
    fc1, activation, fc2 = layers()
    x, seen = torch.randn(12, 6, dtype=torch.float64), []
    handle = activation.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    two_layers(x, fc1, activation, fc2)
    assert seen == [(12, 10)]
    handle.remove()

    class Wrapped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    two_layers(x, fc1, nn.ReLU(inplace=True), fc2)  # which would change what the backward needs
    wrapped = Wrapped(6, 10).double()
    torch.testing.assert_close(two_layers(x, wrapped, activation, fc2), at_once(x, wrapped, activation, fc2))
    torch.testing.assert_close(
        torch.func.vmap(lambda row: two_layers(row, fc1, activation, fc2))(x[:, None]),
        at_once(x[:, None], fc1, activation, fc2),
    )
    pairs = [torch.func.jvp(lambda t, f=f: f(t, fc1, activation, fc2), (x,), (x,)) for f in (two_layers, at_once)]
    torch.testing.assert_close(pairs[0], pairs[1])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        tangent = torch.autograd.forward_ad.unpack_dual(two_layers(dual, fc1, activation, fc2)).tangent
    torch.testing.assert_close(tangent, pairs[0][1])
    with torch.autocast("cpu", torch.bfloat16):
        assert two_layers(x.float(), fc1.float(), activation, fc2.float()).dtype is torch.bfloat16
    assert not by_parts


def test_an_mlp_goes_by_parts_unless_it_drops_out(by_parts: list[int]) -> None:
    mlp, x = MLP(6, 10, dropout=0.5), torch.randn(3, 8, 6)
    mlp(x)
    assert not by_parts
    mlp.eval()
    torch.testing.assert_close(mlp(x), mlp.fc2(mlp.act(mlp.fc1(x))))
    assert by_parts
