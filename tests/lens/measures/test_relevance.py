"""Layer-wise relevance: against the rules written out, what is conserved, and which networks it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlab.lens.measures.relevance import layerwise_relevance, relevance_image


def network(*, bias: bool = False, inplace: bool = False) -> nn.Sequential:
    return (
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=bias),
            nn.ReLU(inplace),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=bias),
            nn.ReLU(inplace),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(24, 5, bias=bias),
        )
        .double()
        .eval()
    )


X = torch.rand(2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_weights(x: torch.Tensor, w: torch.Tensor, relevance: torch.Tensor) -> torch.Tensor:
    """R_i = Σ_j x_i w_ji / Σ_i x_i w_ji · R_j, one output at a time."""
    found = torch.zeros_like(x)
    for j in range(len(w)):
        parts = x * w[j]
        found += parts / (parts.sum() + 1e-9) * relevance[j]
    return found


def as_matrix(conv: nn.Conv2d, shape: torch.Size) -> torch.Tensor:
    units = torch.eye(int(torch.tensor(shape).prod()), dtype=torch.float64).view(-1, *shape)
    return F.conv2d(units, conv.weight, None, conv.stride, conv.padding).flatten(1).T


def test_rules_equal_one_output_at_a_time() -> None:
    conv, linear = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False).double(), nn.Linear(27, 4).double()
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), linear).eval()
    x = torch.rand(1, 2, 6, 6, dtype=torch.float64)
    hidden = model[:3](x)[0]
    matrix = as_matrix(conv, x.shape[1:])
    for rule, bounds in (("official", None), ("zplus", None), ("zplus", (-0.5, 1.5))):
        found = layerwise_relevance(model, x, rule=rule, bounds=bounds)
        middle = by_weights(hidden, linear.weight.clamp(min=0).detach(), found.top[0])
        torch.testing.assert_close(found.layers["3"][0], middle)
        flat, w = x.flatten(), matrix.detach()
        if rule == "official":
            wanted = by_weights(flat, w, middle)
        elif bounds is None:
            wanted = by_weights(flat, w.clamp(min=0), middle)
        else:
            wanted = torch.zeros_like(flat)
            for j in range(len(w)):
                parts = flat * w[j] - bounds[0] * w[j].clamp(min=0) - bounds[1] * w[j].clamp(max=0)
                wanted += parts / (parts.sum() + 1e-9) * middle[j]
        torch.testing.assert_close(found.input.flatten(), wanted)


@pytest.mark.parametrize(("rule", "bounds"), [("official", None), ("zplus", None), ("zplus", (-1.0, 2.0))])
def test_relevance_is_conserved_without_biases(rule, bounds) -> None:
    found = layerwise_relevance(network(), X, rule=rule, bounds=bounds)
    total = found.top.sum((0, 1))
    for relevance in found.layers.values():
        torch.testing.assert_close(relevance.sum(), total, rtol=1e-4, atol=0)


def test_input_times_two_is_relevance_times_two_without_biases() -> None:
    model = network()
    once, twice = (layerwise_relevance(model, x).input for x in (X, 2 * X))
    torch.testing.assert_close(twice, 2 * once, rtol=1e-4, atol=1e-6)


def test_a_zero_pixel_has_no_relevance() -> None:
    x = X.clone()
    x[:, :, 3:5, 6] = 0
    assert not layerwise_relevance(network(bias=True), x).input[:, :, 3:5, 6].any()


def test_layers_that_write_over_their_input_change_nothing() -> None:
    torch.manual_seed(3)
    plain = network(bias=True)
    written = network(bias=True, inplace=True)
    written.load_state_dict(plain.state_dict())
    x = X.clone()
    found, wanted = layerwise_relevance(written, x), layerwise_relevance(plain, X)
    assert torch.equal(x, X) and list(found.layers) == [str(i) for i in range(9)]
    for name in wanted.layers:
        torch.testing.assert_close(found.layers[name], wanted.layers[name])


def test_it_begins_at_the_likeliest_class_or_the_one_asked_for() -> None:
    model = network(bias=True)
    found = layerwise_relevance(model, X)
    assert torch.equal(found.top.sum(1), found.logits.amax(1)) and (found.top != 0).sum() == 2
    asked = layerwise_relevance(model, X, target=torch.tensor([3, 0])).top
    assert torch.equal(asked.nonzero()[:, 1], torch.tensor([3, 0]))
    assert all(p.grad is None for p in model.parameters())


def test_a_picture_of_relevance_spans_zero_to_one_and_keeps_channels() -> None:
    picture = relevance_image(torch.tensor([-2.0, 0.0, 1.0, 0.5]).view(1, 1, 2, 2).repeat(1, 3, 1, 1))
    assert picture.shape == (1, 3, 2, 2) and picture[0, 0].flatten().tolist() == [1.0, 0.0, 0.5, 0.25]
    assert not relevance_image(torch.full((1, 3, 2, 2), 4.0)).any()


def test_a_vgg_as_it_comes_is_a_chain(timm) -> None:
    layers = [8, "M", 16, "M", 16, "M", 16, "M", 16, "M"]
    model = timm.models.vgg.VGG(cfg=layers, num_classes=7).eval()
    for p in model.parameters():
        if p.ndim == 1:
            nn.init.zeros_(p)
    x = torch.rand(1, 3, 224, 224)
    for rule in ("official", "zplus"):
        found = layerwise_relevance(model, x, rule=rule)
        assert found.input.shape == x.shape and next(iter(found.layers)) == "features.0"
        torch.testing.assert_close(found.input.sum(), found.top.sum(), rtol=1e-3, atol=0)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x + self.two(self.one(x).relu()))


def test_networks_that_are_no_chain_are_refused_by_the_name_of_the_layer() -> None:
    with pytest.raises(ValueError, match="head is not given what the layer before it gave"):
        layerwise_relevance(Residual().eval(), torch.rand(2, 4))
    with pytest.raises(ValueError, match="no rule of relevance for 1, a LayerNorm"):
        layerwise_relevance(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).eval(), torch.rand(2, 4))
    with pytest.raises(ValueError, match="eval mode"):
        layerwise_relevance(network().train(), X)
    with pytest.raises(ValueError, match="rule must be"):
        layerwise_relevance(network(), X, rule="gamma")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bounds"):
        layerwise_relevance(network(), X, bounds=(0, 1))
    with pytest.raises(ValueError, match="logits"):
        layerwise_relevance(network()[:3].eval(), X)
    model = network()
    with pytest.raises(ValueError, match="no rule of relevance for 1, a Softmax"):
        layerwise_relevance(nn.Sequential(model, nn.Softmax(1)).eval(), X)
    assert not any(m._forward_hooks for m in model.modules())
