"""VMoBA's block routing: the order of blocks, the mask that is meant, its limits, and what cuboids are for."""

import pytest
import torch
import torch.nn.functional as F

from attnlab.nn.sparse.block_routing import BlockRouting, block_order
from attnlab.routing import TopKBlocks, block_scores

GRID = (4, 4, 6)


@pytest.mark.parametrize("grid", [GRID, (5, 3, 7), (1, 2, 1)])
@pytest.mark.parametrize("block", [(1,), (0.5,), (2,), (2, 3), (2, 2, 3), (99, 99, 99)])
def test_the_order_is_a_permutation_by_block_then_time_row_and_column(grid, block):
    order, blocks = block_order(grid, block)
    assert order.sort().values.tolist() == list(range(len(order)))
    places = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).view(-1, 3)[order]
    if len(block) == 1:
        assert torch.equal(order, torch.arange(len(order)))
        assert blocks.size == min(int(block[0] * grid[1] * grid[2]), len(order))
        return
    tile = torch.tensor((grid[0],) * (3 - len(block)) + block)
    keys = [(*(p // tile).tolist(), *p.tolist()) for p in places]
    assert keys == sorted(keys)
    owners = blocks.block(torch.arange(len(order))).tolist()
    assert all((a[:3] == b[:3]) == (i == j) for a, b, i, j in zip(keys, keys[1:], owners, owners[1:], strict=False))


def test_layers_cycle_through_the_blocks():
    blocks = ((1,), (2, 3), (2, 2, 3))
    assert [BlockRouting(8, heads=2, block=blocks, layer=i).block for i in range(5)] == [*blocks, *blocks[:2]]


@pytest.mark.parametrize("options", [
    {"topk": 2}, {"topk": 2, "scope": "head"}, {"threshold": 0.3}, {"threshold": 0.3, "scope": "block"},
    {"threshold": 0.2, "scope": "head"}, {"threshold": 0.2, "scope": "all", "variant": "release"},
])  # fmt: skip
@pytest.mark.parametrize("block", [(1,), (2, 3), (2, 2, 2)])
def test_it_is_dense_attention_under_the_mask_of_its_blocks(block, options):
    m = BlockRouting(16, heads=2, block=block, **options).double()
    x = torch.randn(2, 96, 16, dtype=torch.float64)
    q, k, v = m.project(x)
    order, blocks = block_order(GRID, block)
    table = m.route(blocks).select(q[:, :, order], k[:, :, order]).table  # (B, H, query, block), queries in order
    token_block = torch.empty(96, dtype=torch.long)
    token_block[order] = blocks.block(torch.arange(96))
    mask = table[:, :, order.argsort()][..., token_block]
    assert (token_block[:, None] == token_block).expand_as(mask)[~mask].sum() == 0  # own blocks are always seen
    torch.testing.assert_close(m(x, grid=GRID), m.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


@pytest.mark.parametrize("options", [{"topk": 99}, {"threshold": 1.5}, {"threshold": 0.1, "block": (99, 99, 99)}])
def test_every_block_chosen_is_full_attention(options):
    m = BlockRouting(16, heads=2, **{"block": (2, 2, 2), **options}).double()
    x = torch.randn(2, 96, 16, dtype=torch.float64)
    torch.testing.assert_close(m(x, grid=GRID), m.merge(F.scaled_dot_product_attention(*m.project(x))))


def test_nothing_beyond_own_blocks_stays_so_on_paper_and_is_full_attention_as_released():
    x = torch.randn(1, 96, 16, dtype=torch.float64)
    torch.manual_seed(0)
    paper = BlockRouting(16, heads=2, block=(2, 2, 2), topk=1).double()
    released = BlockRouting(16, heads=2, block=(2, 2, 2), topk=1, variant="release").double()
    released.load_state_dict(paper.state_dict())
    full = paper.merge(F.scaled_dot_product_attention(*paper.project(x)))
    torch.testing.assert_close(released(x, grid=GRID), full)
    assert not torch.allclose(paper(x, grid=GRID), full)


def test_the_choice_has_no_gradient_but_what_is_chosen_has():
    m = BlockRouting(16, heads=2, block=(2, 2, 3), topk=2).double()
    x = torch.randn(1, 96, 16, dtype=torch.float64, requires_grad=True)
    m(x, grid=GRID).square().sum().backward()
    assert x.grad.abs().amax(-1).min() > 0
    assert all(p.grad.abs().max() > 0 for p in m.parameters())


@pytest.mark.parametrize("seed", range(3))
def test_cuboids_hold_more_attention_than_runs_of_frames_on_video(seed):
    # Tokens whose likeness falls with their distance in space and time: a random field, smoothed along every axis.
    # At equal density (2 blocks of 32 tokens in 512) cuboids keep together what belongs together. Over seeds: runs of
    # frames hold 0.53 to 0.61 of the attention, tiles 0.61 to 0.65, cuboids 0.65 to 0.70.
    torch.manual_seed(seed)
    grid, held = (8, 8, 8), []
    field = torch.randn(1, 16, *(g + 4 for g in grid))
    for axis in (2, 3, 4):
        field = sum(field.narrow(axis, i, field.shape[axis] - 4) for i in range(5)) / 5**0.5
    tokens = 2 * F.normalize(field.flatten(2).transpose(1, 2), dim=-1)[:, None]  # (1, 1, N, 16)
    for block in ((0.5,), (2, 2), (2, 4, 4)):
        order, blocks = block_order(grid, block)
        x = tokens[:, :, order]
        table = TopKBlocks(2, block=blocks, query_block=1, own=True).select(x, x).table
        assert blocks.size == 32 and (table.sum(-1) == 2).all()
        weights = (2 * x @ x.mT).softmax(-1)
        held.append((weights * table[..., blocks.block(torch.arange(512))]).sum(-1).mean().item())
    frames, tiles, cuboids = held
    assert cuboids > frames + 0.07 and cuboids > tiles > frames


def test_the_gate_ignores_the_order_of_tokens_within_a_block():
    q, k = torch.randn(1, 2, 12, 4), torch.randn(1, 2, 12, 4)
    shuffled = k.unflatten(2, (3, 4))[:, :, :, torch.randperm(4)].flatten(2, 3)
    route = TopKBlocks(1, block=4, query_block=1)
    parts = route.partitions(12, 12)
    torch.testing.assert_close(block_scores(q, k, *parts), block_scores(q, shuffled, *parts))


@pytest.mark.parametrize(("keywords", "words"), [
    ({"topk": 2, "threshold": 0.2}, "give topk or threshold, not both"),
    ({"variant": "official"}, "variant must be 'paper' or 'release', got 'official'"),
    ({"block": (2, 2, 2, 2)}, "block must hold one to three positive sizes"),
    ({"block": (2, 0)}, "block must hold one to three positive sizes"),
    ({"causal": True}, "only causal=False exists"),
])  # fmt: skip
def test_bad_arguments_are_named(keywords, words):
    with pytest.raises(ValueError, match=words):
        BlockRouting(8, heads=2, **keywords)


def test_a_block_of_less_than_a_token_is_refused():
    with pytest.raises(ValueError, match=r"block \(0.01,\) holds no whole token of a frame \(4, 6\)"):
        BlockRouting(8, heads=2, block=(0.01,))(torch.randn(1, 96, 8), grid=GRID)
