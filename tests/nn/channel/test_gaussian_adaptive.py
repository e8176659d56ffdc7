"""Gaussian adaptive attention: equal to its definition, and what its weights promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from attnlab.nn.channel.gaussian_adaptive import (
    GaussianAdaptive,
    GaussianAdaptiveClassifier,
    GaussianBlock,
    importance,
)


def make(axis: int, *, shake: bool = True, **keywords) -> GaussianAdaptive:
    torch.manual_seed(0)
    m = GaussianAdaptive(axis, **keywords).double()
    if shake:
        nn.init.normal_(m.offset)
        nn.init.uniform_(m.width, 0.5, 1.5)
    return m


def by_hand(m: GaussianAdaptive, x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, one line of the axis, one head and one Gaussian at a time."""
    lines = x.movedim(m.axis, -1)
    out, weights = lines.clone(), torch.zeros_like(lines)
    n = lines.shape[-1]
    for at in torch.cartesian_prod(*(torch.arange(s) for s in lines.shape[:-1])).reshape(-1, lines.dim() - 1):
        line = lines[tuple(at)]
        for h in range(m.heads):
            begin = h * (n // m.heads)
            end = begin + n // m.heads if h < m.heads - 1 else n
            part = line[begin:end]
            real = torch.ones_like(part, dtype=torch.bool) if m.padding is None else part != m.padding
            counted = part * real
            mean = counted.sum() / len(part)
            sigma = (((counted - mean) ** 2).sum() / (len(part) - 1) + 1e-8).sqrt()
            w = torch.ones_like(part)
            for delta, c in zip(m.offset[h], m.width[h], strict=True):
                y = (part - (mean + delta)) / sigma
                w = w * torch.exp(-(y**2) / (2 * c**2)) / math.sqrt(2 * math.pi * c.item() ** 2)
            w = w / max(w.sum().item(), 1e-8)
            weights[tuple(at)][begin:end] = w
            out[tuple(at)][begin:end] = torch.where(real, part * w, part)
    return out.movedim(-1, m.axis), weights.movedim(-1, m.axis)


@pytest.mark.parametrize(
    ("axis", "heads", "padding"), [(1, 1, None), (1, 2, None), (2, 3, None), (-1, 3, 0.0), (0, 2, 0.0)]
)
@torch.no_grad()
def test_equals_the_definition_along_every_axis(axis: int, heads: int, padding: float | None) -> None:
    m, x = make(axis, heads=heads, gaussians=3, padding=padding), torch.randn(4, 6, 7, dtype=torch.float64)
    if padding is not None:
        x[torch.rand_like(x) < 0.3] = padding
    out, weights = by_hand(m, x)
    torch.testing.assert_close(m.weights(x), weights)
    torch.testing.assert_close(m(x), out)


def test_weights_are_shares_of_each_heads_stretch() -> None:
    m, x = make(1, heads=3), torch.randn(2, 11, 4, dtype=torch.float64)
    w = m.weights(x)
    assert bool((w >= 0).all())
    for stretch in w.split([3, 3, 5], 1):
        torch.testing.assert_close(stretch.sum(1), torch.ones(2, 4, dtype=torch.float64))


def test_without_offsets_shift_and_scale_of_the_input_change_no_weight() -> None:
    m, x = make(2, shake=False), torch.randn(2, 3, 9, dtype=torch.float64)
    torch.testing.assert_close(m.weights(x), m.weights(2.5 * x - 7), rtol=1e-6, atol=1e-9)
    nn.init.ones_(m.offset)  # in raw units: a shift still changes nothing, a scale does
    torch.testing.assert_close(m.weights(x), m.weights(x - 7))
    assert not torch.allclose(m.weights(x), m.weights(2.5 * x), rtol=1e-2)


def test_permuting_the_axis_inside_a_head_permutes_the_output() -> None:
    m, x = make(1), torch.randn(2, 8, 3, dtype=torch.float64)
    order = torch.randperm(8)
    torch.testing.assert_close(m(x[:, order]), m(x)[:, order])


def test_wide_gaussians_weigh_evenly_and_a_single_one_peaks_at_its_offset_from_the_mean() -> None:
    m, x = make(1, gaussians=1), torch.linspace(-2, 2, 41, dtype=torch.float64)[None]
    nn.init.constant_(m.width, 1e6)
    torch.testing.assert_close(m.weights(x), torch.full_like(x, 1 / 41))
    nn.init.constant_(m.width, -0.3)  # only its square counts
    nn.init.constant_(m.offset, 0.7)
    assert x[0, m.weights(x).argmax()].item() == pytest.approx(0.7)


def test_far_outliers_underflow_to_zero_and_not_to_nan() -> None:
    m = make(1, gaussians=8).float()
    nn.init.constant_(m.offset, 50.0)
    nn.init.constant_(m.width, 0.01)
    x = torch.randn(2, 16).requires_grad_()
    y = m(x)
    y.sum().backward()
    assert bool((y == 0).all()) and x.grad is not None and bool(x.grad.isfinite().all())


def test_gradients_are_right() -> None:
    m, x = make(1, heads=2), torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, offset: Tensor, width: Tensor) -> Tensor:
        return torch.func.functional_call(m, {"offset": offset, "width": width}, (x,))

    assert torch.autograd.gradcheck(run, (x, m.offset, m.width))


def test_importance_finds_the_layer_that_is_weighed_most() -> None:
    m = make(1, shake=False, gaussians=1)
    nn.init.constant_(m.offset, 4.0)
    nn.init.constant_(m.width, 1.0)
    batches = [torch.randn(3, 6, 5, 4, dtype=torch.float64) for _ in range(2)]
    for x in batches:
        x[:, 2] += 6
    found = importance(m, batches)
    assert found.argmax() == 2 and found.max() == 1 and found.min() == 0
    torch.testing.assert_close(found, importance(m, [torch.cat(batches)]))
    assert not importance(m, [torch.zeros(1, 6, 2, 2)]).any()
    with pytest.raises(ValueError, match="data must yield"):
        importance(m, [])


def test_a_block_costs_two_numbers_per_gaussian_head_and_layer() -> None:
    block = GaussianBlock(layers=3, heads=4, gaussians=5)
    assert sum(p.numel() for p in block.parameters()) == 3 * 2 * 4 * 5


def losses(learn: bool) -> tuple[float, float]:
    """Loss of a classifier of eight layers' features, of which one, an outlier, tells the class; its importance."""
    torch.manual_seed(0)
    patterns = 0.8 * torch.randn(4, 4)
    model = GaussianAdaptiveClassifier(4, 4, hidden=16, gaussians=1, dropout=0.0)
    nn.init.ones_(model.attention.width)
    model.attention.offset.requires_grad_(learn)
    groups = [dict(params=model.classifier.parameters(), lr=2e-2), dict(params=model.attention.parameters(), lr=3e-2)]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(150):
        label = torch.randint(4, (256,))
        x = torch.randn(256, 8, 1, 4)
        x[:, 5] = 3 + patterns[label][:, None]
        loss = nn.functional.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), importance(model.attention, [x])[5].item()


def test_learned_offsets_move_the_attention_to_outliers_that_carry_the_class() -> None:
    """The paper's claim: offsets let attention leave the mean for where the information is, and tell where."""
    learned, importance_of_the_outlier = losses(learn=True)
    fixed, _ = losses(learn=False)
    assert learned < 0.5 < 1 < fixed
    assert importance_of_the_outlier == 1


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: GaussianAdaptive(1, heads=0), "heads must be a positive integer"),
        (lambda: GaussianAdaptive(1, gaussians=2.5), "gaussians must be a positive integer"),  # type: ignore[arg-type]
        (lambda: GaussianAdaptive(3)(torch.randn(2, 3, 4)), "axis 3 must be one of"),
        (lambda: GaussianAdaptive(1, heads=2)(torch.randn(2, 3)), "at least 2·heads = 4 entries on axis 1, got 3"),
        (lambda: GaussianBlock(layers=2, heads=[1, 2, 3]), "heads must be one number or one for each of 2 layers"),
        (lambda: GaussianAdaptiveClassifier(8, 2, axis=0), "axis must be 1"),
        (lambda: GaussianAdaptiveClassifier(8, 2)(torch.randn(2, 3, 8)), "x must be"),
    ],
)
def test_errors_name_what_is_wrong(make_it, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_it()


def test_other_kinds_of_input_are_refused() -> None:
    with pytest.raises(TypeError, match="x must be floating-point"):
        GaussianAdaptive(1)(torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(TypeError, match="axis must be an integer"):
        GaussianAdaptive(1.0)  # type: ignore[arg-type]
