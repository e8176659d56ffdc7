"""Groups of a map: cut and join, spread and adjacent, equality with loops over single tokens, filling, reach."""

import math

import pytest
import torch
from torch import Tensor

from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.groups import GroupAttention, Groups
from attnlab.nn.spatial.multi_axis import BlockAttention, GridAttention


@pytest.mark.parametrize("grid", [(8, 8), (6, 12), (7, 5), (1, 3)])
@pytest.mark.parametrize("step", [(1, 1), (2, 2), (2, 3)])
def test_join_undoes_cut(grid, step):
    groups, maps = Groups(grid, (2, 2), step), torch.randn(3, *grid, 4)
    assert groups.cut(maps).shape == (3 * groups.count, 4, 4)
    assert torch.equal(groups.join(groups.cut(maps)), maps)


def test_a_group_is_what_stands_step_apart_within_a_region():
    at = torch.arange(48.0).view(1, 6, 8, 1)
    tiles = Groups((6, 8), (3, 2), (2, 4)).cut(at)[..., 0].long()
    for tile in tiles:
        rows, columns = tile // 8, tile % 8
        assert rows.view(3, 2)[:, 0].diff().tolist() == [2, 2]
        assert columns.view(3, 2)[0].diff().tolist() == [4]
    assert sorted(tiles.flatten().tolist()) == list(range(48))
    assert torch.equal(Groups.spread((6, 8), (3, 2)).cut(at)[..., 0].long(), tiles)


def test_filled_in_tokens_are_told_apart():
    groups = Groups((3, 5), (2, 2), (2, 1))
    assert groups.filling == (1, 1)
    assert torch.equal(groups.join(groups.real(torch.ones(1))[..., None]), torch.ones(1, 3, 5, 1, dtype=torch.bool))
    assert int(groups.real(torch.ones(1)).sum()) == 15


def oracle(m: GroupAttention, x: Tensor, grid: tuple[int, int], step: tuple[int, int]) -> Tensor:
    """Token by token: who is in my group, and where does it stand in the group?"""
    (height, width), w, depth = grid, m.window, m.head_dim
    q, k, v = m.wqkv(x).unflatten(-1, (3, m.heads, depth)).unbind(2)
    table = m.relative.table.view(2 * w - 1, 2 * w - 1, m.heads)
    out = torch.zeros_like(q)
    places = [(i, j) for i in range(height) for j in range(width)]

    def group(i: int, j: int) -> tuple[int, ...]:
        return (i // (w * step[0]), i % step[0], j // (w * step[1]), j % step[1])

    for a, (i, j) in enumerate(places):
        mine = [b for b, other in enumerate(places) if group(*other) == group(i, j)]
        for h in range(m.heads):
            scores = []
            for b in mine:
                down = i // step[0] % w - places[b][0] // step[0] % w
                across = j // step[1] % w - places[b][1] // step[1] % w
                score = (q[:, a, h] * k[:, b, h]).sum(-1) / math.sqrt(depth)
                scores.append(score + table[down + w - 1, across + w - 1, h])
            weights = torch.stack(scores, -1).softmax(-1)
            out[:, a, h] = torch.einsum("bn,bnd->bd", weights, v[:, mine, h])
    return m.wo(out.flatten(2))


@pytest.mark.parametrize("grid", [(4, 6), (5, 3)], ids=["whole", "filled"])
@pytest.mark.parametrize("kind", [BlockAttention, GridAttention])
def test_equals_attention_token_by_token(kind, grid):
    m = kind(4, heads=2, window=2).double()
    x = torch.randn(2, grid[0] * grid[1], 4, dtype=torch.float64)
    step = m.groups(grid).step
    assert step == ((1, 1) if kind is BlockAttention else (-(-grid[0] // 2), -(-grid[1] // 2)))
    torch.testing.assert_close(m(x, grid=grid), oracle(m, x, grid, step))


def test_filling_is_seen_only_where_asked_for():
    x = torch.randn(1, 9, 4)
    blind, seeing = (BlockAttention(4, heads=2, window=2, see_filling=see) for see in (False, True))
    seeing.load_state_dict(blind.state_dict())
    inside = [0, 1, 3, 4]  # the one window that is whole
    a, b = blind(x, grid=(3, 3)), seeing(x, grid=(3, 3))
    torch.testing.assert_close(a[:, inside], b[:, inside])
    assert not torch.isclose(a[:, 8], b[:, 8]).all()
    # By hand: the last token alone in its window, with three zeros beside it.
    full = MultiHead(4, heads=2, bias=True)
    full.load_state_dict({n: t for n, t in seeing.state_dict().items() if not n.startswith("relative")})
    tokens = torch.cat((x[:, 8:], torch.zeros(1, 3, 4)), 1)
    seeing.relative.table.data.zero_()
    torch.testing.assert_close(seeing(x, grid=(3, 3))[:, 8], full(tokens)[:, 0])


def test_gradients_stay_finite_where_whole_groups_are_filling():
    m = GridAttention(4, heads=2, window=4)
    x = torch.randn(1, 5, 4, requires_grad=True)
    m(x, grid=(1, 5)).sum().backward()
    assert all(p.grad.isfinite().all() for p in m.parameters()) and x.grad.isfinite().all()


def test_grid_attention_as_large_as_the_map_is_full_attention():
    m = GridAttention(8, heads=2, window=5, out_bias=False, biased=False)
    full = MultiHead(8, heads=2, bias=True, out_bias=False)
    full.load_state_dict(m.state_dict())
    x = torch.randn(2, 25, 8)
    torch.testing.assert_close(m(x, grid=(5, 5)), full(x))


def test_block_attention_commutes_with_shifts_by_the_window():
    m, maps = BlockAttention(8, heads=2, window=4), torch.randn(1, 8, 12, 8)
    moved = m(maps.roll((4, 8), (1, 2)).flatten(1, 2), grid=(8, 12)).view_as(maps)
    torch.testing.assert_close(moved, m(maps.flatten(1, 2), grid=(8, 12)).view_as(maps).roll((4, 8), (1, 2)))


def support(*mixers: GroupAttention) -> Tensor:
    """Where on a 12×12 map the gradient of the token at (5, 4) is not zero."""
    x = torch.randn(1, 144, 4, dtype=torch.float64, requires_grad=True)
    y = x
    for mixer in mixers:
        y = mixer.double()(y, grid=(12, 12))
    return torch.autograd.grad(y[0, 5 * 12 + 4].sum(), x)[0][0].view(12, 12, 4).abs().sum(-1) != 0


def test_windows_then_a_grid_reach_everything_which_neither_does_alone():
    block, grid = BlockAttention(4, heads=1, window=4), GridAttention(4, heads=1, window=3)
    near = torch.zeros(12, 12, dtype=torch.bool)
    near[4:8, 4:8] = True
    assert torch.equal(support(block), near)
    spread = torch.zeros(12, 12, dtype=torch.bool)
    spread[1::4, 0::4] = True
    assert torch.equal(support(grid), spread)
    assert support(block, grid).all()
    assert torch.equal(support(block, BlockAttention(4, heads=1, window=4)), near)


def test_another_window_keeps_a_bias_that_is_linear_in_the_displacement():
    m = BlockAttention(4, heads=2, window=3)
    steps = torch.arange(-2.0, 3.0)
    m.relative.table.data = (3 * steps[:, None] + steps)[..., None].expand(5, 5, 2).flatten(0, 1).clone()
    m.rewindow(6)
    assert m.relative.table.shape == (121, 2)
    table = m.relative.table.view(11, 11, 2)
    inner = table[2:9, 2:9]  # the edges are held, as in any bilinear resizing
    torch.testing.assert_close(inner.diff(dim=0), torch.full_like(inner[1:], 3 * 5 / 11))
    torch.testing.assert_close(inner.diff(dim=1), torch.full_like(inner[:, 1:], 5 / 11))
    assert m(torch.randn(1, 36, 4), grid=(6, 6)).shape == (1, 36, 4)


def test_a_kept_bias_follows_its_parameters():
    m, x = BlockAttention(8, heads=2, window=3), torch.randn(1, 9, 8)
    with torch.inference_mode():
        before = m(x, grid=(3, 3))
        assert torch.equal(m(x, grid=(3, 3)), before)
    m.relative.table.data[0] += 5.0  # in place: the parameter is the same object
    with torch.no_grad():
        after = m(x, grid=(3, 3))
    assert not torch.isclose(after, before).all()
    torch.testing.assert_close(after, m(x, grid=(3, 3)).detach())
    with torch.no_grad():
        assert m.double()(x.double(), grid=(3, 3)).dtype == torch.float64


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        BlockAttention(8, heads=2, window=0)
    with pytest.raises(ValueError, match="causal must be False"):
        GridAttention(8, heads=2, causal=True)
    with pytest.raises(ValueError, match="grid must be given"):
        GridAttention(8, heads=2)(torch.randn(1, 4, 8))
