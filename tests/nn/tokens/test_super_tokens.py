"""Super tokens: the equations pixel by pixel, what has no gradient, borders and padding, segments of a photograph."""

import math

import pytest
import torch
import torch.nn.functional as F

from attnlab.cost import count_flops, fit_growth
from attnlab.nn.multihead import MultiHead
from attnlab.nn.tokens.super_tokens import SuperTokens, around, collect


def written_out(module, x, cell, steps):
    """The association and the super tokens of one map (C, H, W), one pixel and one neighbour at a time."""
    channels, height, width = x.shape
    rows, columns = height // cell, width // cell
    tokens = {}
    for i in range(rows):
        for j in range(columns):
            tokens[i, j] = x[:, i * cell : (i + 1) * cell, j * cell : (j + 1) * cell].mean((1, 2))
    for _ in range(steps):
        shares, total, given = {}, {}, {}
        for y in range(height):
            for z in range(width):
                near = [(y // cell + a, z // cell + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
                zero = torch.zeros(channels, dtype=x.dtype)
                logits = [(tokens.get(p, zero) @ x[:, y, z]).item() / channels**0.5 for p in near]
                weights = [math.exp(score - max(logits)) for score in logits]
                shares[y, z] = {p: w / sum(weights) for p, w in zip(near, weights, strict=True)}
                for p, share in shares[y, z].items():
                    total[p] = total.get(p, 0) + share
                    given[p] = given.get(p, 0) + share * x[:, y, z]
        tokens = {p: given[p] / (total[p] + 1e-12) for p in tokens}
    mixed = module.attention(torch.stack([tokens[i, j] for i in range(rows) for j in range(columns)])[None])[0]
    out = torch.zeros_like(x)
    for (y, z), near in shares.items():
        for (i, j), share in near.items():
            if 0 <= i < rows and 0 <= j < columns:
                out[:, y, z] += share * mixed[i * columns + j]
    return out


@pytest.mark.parametrize(("cell", "steps"), [(2, 1), (2, 2), (3, 2)])
def test_agrees_with_the_equations_written_out(cell, steps):
    module = SuperTokens(8, heads=2, cell=cell, steps=steps).double()
    x = torch.randn(1, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(module(x)[0], written_out(module, x[0], cell, steps))


def test_a_cell_of_one_pixel_is_softmax_attention():
    module = SuperTokens(8, heads=2, cell=1).double()
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    q, k, v = module.attention.qkv(x.flatten(2).mT)
    wanted = module.attention.merge(F.scaled_dot_product_attention(q, k, v)).mT.unflatten(2, (3, 4))
    torch.testing.assert_close(module(x), wanted)


def test_collecting_is_the_adjoint_of_looking_around():
    tokens, parts = torch.randn(2, 3, 4, 5), torch.randn(2, 12, 9, 5)
    torch.testing.assert_close((around(tokens) * parts).sum(), (collect(parts, (3, 4)) * tokens).sum())


def test_shares_of_a_pixel_sum_to_one_and_carry_no_gradient():
    module = SuperTokens(8, heads=2, cell=2, steps=2)
    pixels, grid = module.cells(torch.randn(1, 6, 6, 8, requires_grad=True))
    sampled = module.sample(pixels, grid)
    torch.testing.assert_close(sampled.association.sum(-1), torch.ones(1, 9, 4))
    assert sampled.tokens.requires_grad and not sampled.association.requires_grad


def test_a_constant_map_stays_constant_away_from_the_border():
    module = SuperTokens(8, heads=2, cell=2)
    y = module(torch.randn(1, 8, 1, 1).expand(-1, -1, 10, 10))
    inside = y[:, :, 2:-2, 2:-2]
    torch.testing.assert_close(inside, inside[:, :, :1, :1].expand_as(inside))
    assert not torch.allclose(y[:, :, 0, 0], inside[:, :, 0, 0])


def test_padding_is_zeros_that_take_part():
    module = SuperTokens(8, heads=2, cell=(3, 2)).double()
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(module(x), module(F.pad(x, (0, 1, 0, 2)))[:, :, :7, :9])


def test_costs_less_than_attention_the_larger_the_map():
    ours, full = SuperTokens(16, heads=2, cell=8), MultiHead(16, heads=2)
    places, costs = [], []
    for side in (32, 64, 128):
        x = torch.randn(1, 16, side, side, device="meta")
        with torch.no_grad():
            mine = count_flops(ours.to("meta"), x)
            costs.append((mine, count_flops(full.to("meta"), x.flatten(2).mT)))
        places.append(side * side)
    ratios = [theirs / mine for mine, theirs in costs]
    assert ratios == sorted(ratios) and ratios[-1] > 100
    assert fit_growth(places, [mine for mine, _ in costs]) < 1.2


def test_segments_follow_a_photograph_better_than_squares():
    """As superpixels do: less of the colours' variance is left inside them, as many as there are 8×8 squares."""
    data = pytest.importorskip("skimage.data")
    picture = torch.tensor(data.astronaut()[::4, ::4], dtype=torch.float32) / 255
    # Random Fourier features, whose products fall with the distance between colours.
    angles = picture @ torch.randn(3, 32) * 4
    features = 4 * torch.cat((angles.cos(), angles.sin()), -1).permute(2, 0, 1)[None]
    module = SuperTokens(64, cell=8, steps=3)
    labels = module.segments(features)[0]
    squares = torch.arange(16).repeat_interleave(8)[:, None] * 16 + torch.arange(16).repeat_interleave(8)

    def left(labels: torch.Tensor) -> float:
        hot = F.one_hot(labels.flatten(), 256).float()
        colours = picture.flatten(0, 1)
        means = hot.mT @ colours / hot.sum(0).clamp(min=1).unsqueeze(1)
        return ((colours - hot @ means) ** 2).mean().item()

    assert left(labels) < 0.6 * left(squares)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="cell must be one or two sizes"):
        SuperTokens(8, heads=2, cell=0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        SuperTokens(8, heads=2, steps=0)
    with pytest.raises(ValueError, match=r"x must be \(B, 8, H, W\)"):
        SuperTokens(8, heads=2)(torch.randn(1, 4, 8, 8))
