"""Layouts: each a permutation with its exact inverse, and each makes adjacent what it says."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlab import layouts
from attnlab.patterns import Axial, Blocks, Neighborhood

GRIDS = [(1,), (12,), (7, 9), (8, 8), (1, 5), (4, 5, 6)]
MAKERS = {
    "tiles": lambda grid: layouts.tiles(grid, 3),
    "shifted tiles": lambda grid: layouts.tiles(grid, 4, shift=1),
    "residues": lambda grid: layouts.residues(grid, 3),
    "axial": lambda grid: layouts.axial(grid, 0),
    "shift": lambda grid: layouts.shift(grid, -2),
    "morton": layouts.morton,
    "by score": lambda grid: layouts.by_score(torch.arange(math.prod(grid)) * 7 % 5),
    "by label": lambda grid: layouts.by_label(torch.arange(math.prod(grid)) % 3),
    "two in turn": lambda grid: layouts.shift(grid, 1).then(layouts.morton(grid)),
}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_every_layout_is_a_permutation_with_its_exact_inverse(name, grid):
    layout, tokens = MAKERS[name](grid), math.prod(grid)
    assert torch.equal(layout.order.sort().values, torch.arange(tokens))
    assert not layout.lengths or sum(layout.lengths) == tokens
    x = torch.randn(2, tokens, 3)
    assert torch.equal(layout.apply(x), x[:, layout.order])
    assert torch.equal(layout.invert(layout.apply(x)), x)
    assert torch.equal(layout.apply(layout.invert(x)), x)
    assert torch.equal(layout.apply(x.mT, dim=-1), layout.apply(x).mT)


@given(st.integers(1, 40), st.integers(1, 40))
def test_the_hilbert_curve_visits_every_token_of_any_grid_by_steps_to_a_neighbour(height, width):
    order = layouts.hilbert((height, width)).order
    assert torch.equal(order.sort().values, torch.arange(height * width))
    step = torch.stack([order // width, order % width]).diff().abs()
    assert (step <= 1).all()
    assert (step.sum(0) > 1).sum() <= 1


def test_morton_orders_a_square_by_quadrants():
    assert layouts.morton((4, 4)).order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


@pytest.mark.parametrize(
    ("layout", "pattern"),
    [
        (layouts.tiles((7, 9), (3, 4)), Blocks((7, 9), (3, 4))),
        (layouts.tiles((8, 12), 4, shift=2), Blocks((8, 12), 4, shift=2)),
        (layouts.axial((7, 9), 0), Axial((7, 9), 0)),
        (layouts.residues((6, 9), 3), Neighborhood((6, 9), (2, 3), dilation=3)),
    ],
    ids=["tiles", "shifted tiles", "axial", "residues"],
)
def test_the_groups_of_a_layout_are_what_its_pattern_attends_within(layout, pattern):
    order = layout.order
    seen = pattern.matrix(len(order))[order][:, order]
    assert torch.equal(seen, torch.block_diag(*(torch.ones(n, n) for n in layout.lengths)).bool())


def test_shift_moves_every_axis_on_cyclically():
    x = torch.arange(20.0).view(1, 20, 1)
    assert torch.equal(layouts.shift((4, 5), (1, 2)).apply(x).view(4, 5), x.view(4, 5).roll((1, 2), (0, 1)))


def test_each_batch_entry_may_have_its_own_order():
    score = torch.randn(3, 10)
    x = score.unsqueeze(-1)
    layout = layouts.by_score(score, descending=True)
    assert torch.equal(layout.apply(x)[..., 0], score.sort(descending=True).values)
    assert torch.equal(layout.invert(layout.apply(x)), x)
    heads = torch.randn(3, 2, 10, 4)
    assert torch.equal(layout.invert(layout.apply(heads, dim=2), dim=2), heads)


def test_equal_scores_keep_their_order_and_labels_come_in_groups():
    assert layouts.by_score(torch.tensor([1, 0, 1, 0])).order.tolist() == [1, 3, 0, 2]
    grouped = layouts.by_label(torch.tensor([5, 2, 5, 2, 2]))
    assert grouped.order.tolist() == [1, 3, 4, 0, 2] and grouped.lengths == (3, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layouts.tiles((4, 4), 0), "size must be at least 1, got 0"),
        (lambda: layouts.tiles((4, 4), (2, 2, 2)), "size must be one integer or one for each of the 2 axes"),
        (lambda: layouts.axial((4, 4), 2), "axis must be one of the 2 axes"),
        (lambda: layouts.hilbert((4, 4, 4)), "grid must have two axes for a Hilbert curve"),
        (lambda: layouts.morton((4, 0)), "grid must be integers of at least 1"),
        (lambda: layouts.morton((4, 4)).apply(torch.zeros(1, 15, 2)), "x must have 16 tokens on axis -2"),
        (lambda: layouts.by_score(torch.zeros(2, 4)).apply(torch.zeros(3, 4, 1)), "x must have the layout's batch"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
