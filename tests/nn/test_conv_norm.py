"""A convolution and its batch norm: the same whether the norm is folded on the way, for good, or not at all."""

import copy

import pytest
import torch
from torch import nn

from attnlab import cards
from attnlab.nn.conv_norm import ConvNorm, Pointwise, ResidualConv, fold_norms

D = torch.float64
KINDS = {
    "3x3": lambda: ConvNorm(3, 4, 3, 2, activation=nn.ReLU()),
    "1x1": lambda: ConvNorm(3, 4, 1, activation=nn.ReLU()),
    "strided 1x1": lambda: ConvNorm(3, 4, 1, 2),
    "depthwise": lambda: ConvNorm(3, 3, 3, groups=3),
    "residual": lambda: ResidualConv(3),
    "with a pool": lambda: ConvNorm(3, 4, 3, activation=nn.ReLU()).append(nn.MaxPool2d(2)),
}


def made(kind: str) -> ConvNorm:
    module = KINDS[kind]().to(D).eval()
    for name, t in module.state_dict().items():
        if t.is_floating_point():
            nn.init.uniform_(t, 0.5, 1.5) if "running_var" in name else nn.init.normal_(t)
    return module


def plainly(module: ConvNorm, x: torch.Tensor) -> torch.Tensor:
    y = module.norm(nn.Conv2d.forward(module.conv, x))
    for follows in list(module)[2:]:
        y = follows(y)
    return x + y if isinstance(module, ResidualConv) else y


@pytest.mark.parametrize("size", [(2, 2), (16, 20)], ids=["few places", "many places"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("kind", KINDS)
def test_folding_changes_nothing_in_evaluation(kind, layout, size, monkeypatch):
    monkeypatch.setattr("attnlab.nn.conv_norm._WORTH", 1)
    module = made(kind)
    x = torch.randn(2, 3, *size, dtype=D).to(memory_format=layout).requires_grad_()
    assert module.folds(x) is (size == (16, 20))
    wanted = plainly(module, x)
    torch.testing.assert_close(module(x), wanted)
    weight, params = torch.randn_like(wanted), [x, *module.parameters()]
    for ours, theirs in zip(
        *(torch.autograd.grad((y * weight).sum(), params) for y in (module(x), wanted)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    folded = copy.deepcopy(module)
    fold_norms(folded)
    fold_norms(folded)  # twice is once
    torch.testing.assert_close(folded(x), wanted)


@pytest.mark.parametrize("name", cards.names(kind="backbone"))
def test_no_backbone_changes_by_folding(name, monkeypatch):
    network = cards.build(name, **cards.describe(name).sample).to(D).eval()
    for key, t in network.state_dict().items():
        if "running_mean" in key:
            nn.init.normal_(t, std=0.1)
    x = torch.randn(2, 3, *(cards.describe(name).probe or (64, 64)), dtype=D)
    with torch.no_grad():
        monkeypatch.setattr("attnlab.nn.conv_norm.ConvNorm.folds", lambda self, x: not self.training)
        folded = network(x)
        monkeypatch.setattr("attnlab.nn.conv_norm.ConvNorm.folds", lambda self, x: False)
        torch.testing.assert_close(folded, network(x))


@pytest.mark.parametrize("kind", KINDS)
def test_training_uses_the_batch(kind):
    module, x = made(kind).train(), torch.randn(2, 3, 16, 20, dtype=D)
    before = module.norm.running_mean.clone()
    wanted = plainly(copy.deepcopy(module), x)
    assert not module.folds(x)
    torch.testing.assert_close(module(x), wanted)
    assert not torch.equal(module.norm.running_mean, before)


def test_only_plain_1x1_convolutions_are_pointwise():
    assert [isinstance(make().conv, Pointwise) for make in KINDS.values()] == [False, True, False, False, False, False]


def test_folding_in_training_is_refused():
    with pytest.raises(ValueError, match=r"fold_norms needs eval\(\)"):
        fold_norms(ConvNorm(4, 4))
