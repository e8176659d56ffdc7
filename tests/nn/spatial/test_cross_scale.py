"""Short- and long-distance attention: who is in a group, small maps, filling, and the bias at two sizes of group."""

import pytest
import torch
from torch import nn

from attnlab.nn.spatial.cross_scale import LongShortDistance
from attnlab.positions.dynamic import DynamicBias


def test_a_group_is_the_same_residues_within_its_region():
    m = LongShortDistance(16, heads=2, window=2, interval=3).double()
    x = torch.randn(1, 12 * 12, 16, dtype=torch.float64, requires_grad=True)
    y = m(x, grid=(12, 12))
    reach = torch.autograd.grad(y[0, 7 * 12 + 5].sum(), x)[0][0].view(12, 12, 16).abs().sum(-1) != 0
    wanted = torch.zeros(12, 12, dtype=torch.bool)
    wanted[7::3, 2:6:3] = True  # rows 7 and 10 of the lower region, columns 2 and 5 of the left one
    assert torch.equal(reach, wanted)


def test_at_interval_one_it_is_attention_among_neighbours():
    m = LongShortDistance(16, heads=2, window=4)
    assert m.groups((8, 12)).step == (1, 1)
    x = torch.randn(2, 96, 16)
    alone = m(x.view(2, 8, 12, 16)[:, 4:, 4:8].flatten(1, 2), grid=(4, 4))
    torch.testing.assert_close(m(x, grid=(8, 12)).view(2, 8, 12, 16)[:, 4:, 4:8].flatten(1, 2), alone)


@pytest.mark.parametrize("grid", [(7, 7), (7, 14), (5, 9)])
def test_a_map_no_larger_than_the_window_has_groups_of_its_smaller_side(grid):
    m = LongShortDistance(16, heads=2, window=7, interval=4)
    groups = m.groups(grid)
    assert groups.size == (min(grid), min(grid)) and groups.step == (1, 1)
    assert m(torch.randn(1, grid[0] * grid[1], 16), grid=grid).isfinite().all()


def test_what_fills_the_map_up_changes_nothing():
    m = LongShortDistance(16, heads=2, window=2, interval=2).double()
    x = torch.randn(1, 15, 16, dtype=torch.float64)  # 3×5, filled up to 4×8
    groups = m.groups((3, 5))
    q, k, v = m.qkv(groups.cut(x.unflatten(1, (3, 5))))
    fake = ~groups.real(x).view(-1, 1, 4, 1)
    other = m.within(groups, q, k.masked_fill(fake, 7.0), v.masked_fill(fake, -9.0))
    torch.testing.assert_close(m(x, grid=(3, 5)), other)


def test_displacements_that_two_windows_share_have_one_bias():
    bias = DynamicBias(3, hidden=8)
    small, large = bias.table((5, 5)).view(9, 9, 3), bias.table((7, 7)).view(13, 13, 3)
    torch.testing.assert_close(large[2:11, 2:11], small)
    matrix = bias.matrix((2, 3))  # places (0, 0) … (1, 2): query (1, 0) is 3, key (0, 2) is 2
    torch.testing.assert_close(matrix[:, 3, 2], bias.mlp(torch.tensor([1.0, -2.0])))


def test_the_bias_is_not_residual():
    bias, step = DynamicBias(2, hidden=4), torch.tensor([[2.0, -1.0]])
    h = bias.mlp[0](step)
    for norm, linear in ((1, 3), (4, 6), (7, 9)):
        h = bias.mlp[linear](torch.relu(bias.mlp[norm](h)))
    torch.testing.assert_close(bias.mlp(step), h)
    assert [type(m) for m in bias.mlp].count(nn.LayerNorm) == 3


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="interval must be at least 1, got 0"):
        LongShortDistance(16, heads=2, interval=0)
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        DynamicBias(2, hidden=0)
    with pytest.raises(ValueError, match=r"window must have 2 axes, got \(3,\)"):
        DynamicBias(2, hidden=4).table((3,))
    with pytest.raises(ValueError, match="window must be given at construction"):
        DynamicBias(2, hidden=4).bias(4, 4)
