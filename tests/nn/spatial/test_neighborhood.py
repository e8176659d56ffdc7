"""Neighborhood attention: the paper's equation, its limits, and what the window's rule implies."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from attnlab.cost import count_flops, fit_growth
from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.neighborhood import NeighborhoodAttention, Offset
from attnlab.patterns import Blocks, Neighborhood, Regions


def build(dim=12, **keywords):
    torch.manual_seed(0)
    module = NeighborhoodAttention(dim, heads=keywords.pop("heads", 3), **keywords).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def tokens(*grid, batch=2, dim=12):
    return torch.randn(batch, math.prod(grid), dim, dtype=torch.float64)


def by_hand(module, x, grid):
    """The equation, one query and head at a time, with the rule of the window written out again."""
    q, k, v = module.qkv(x)
    axes = len(grid)
    out = torch.zeros_like(q)
    places = list(itertools.product(*map(range, grid)))

    def keys_on(axis, i):
        length, d, w = grid[axis], module.dilation[axis], module.kernel[axis]
        group = range(i % d, length, d)
        start = min(max(i // d - w // 2, 0), len(group) - w)
        return [group[t] for t in range(start, start + w)]

    for i, place in enumerate(places):
        keys = list(itertools.product(*(keys_on(a, place[a]) for a in range(axes))))
        index = torch.tensor([places.index(key) for key in keys])
        for h in range(q.shape[1]):
            scores = k[:, h, index] @ q[:, h, i, :, None] * q.shape[-1] ** -0.5
            if module.table is not None:
                table = module.table[:, h].view([2 * w - 1 for w in module.kernel])
                entry = [
                    table[tuple((key[a] - place[a]) // module.dilation[a] + module.kernel[a] - 1 for a in range(axes))]
                    for key in keys
                ]
                scores = scores + torch.stack(entry)[:, None]
            out[:, h, i] = (scores.softmax(1) * v[:, h, index]).sum(1)
    return module.merge(out)


@pytest.mark.parametrize(
    ("grid", "kernel", "dilation"),
    [((11,), 5, 2), ((6, 7), (3, 2), 1), ((7, 9), 3, (2, 3)), ((3, 4, 5), (2, 3, 2), (1, 1, 2))],
)
@pytest.mark.parametrize("relative", [False, True])
def test_it_is_the_papers_equation_in_one_two_and_three_dimensions(grid, kernel, dilation, relative):
    module = build(axes=len(grid), kernel=kernel, dilation=dilation, relative=relative)
    x = tokens(*grid, batch=1)
    torch.testing.assert_close(module(x, grid=grid), by_hand(module, x, grid))


def test_the_table_is_trained_as_finite_differences_say():
    module = build(dim=4, heads=2, kernel=3, dilation=2, relative=True)
    x = tokens(6, 7, batch=1, dim=4)
    assert torch.autograd.gradcheck(lambda t: F.linear(_with(module, t)(x, grid=(6, 7)), torch.ones(1, 4).double()),
                                    module.table.detach().clone().requires_grad_())  # fmt: skip


def _with(module, table):
    return lambda *a, **k: torch.func.functional_call(module, {"table": table}, a, k)


def test_the_row_of_the_table_stays_inside_it_for_every_pair():
    row = Offset((7, 9), (3, 5), (2, 1))
    q, k = torch.arange(63)[:, None], torch.arange(63)
    assert row(q, k).min() >= 0 and row(q, k).max() < 5 * 9
    seen = Neighborhood((7, 9), (3, 5), (2, 1)).matrix(63)
    # Inside windows, the same displacement is the same row and no other is.
    for a in ((3, 4), (0, 0), (6, 8)):
        i = a[0] * 9 + a[1]
        rows = row(torch.tensor(i), k)[seen[i]]
        assert len(rows.unique()) == 15


def test_a_kernel_of_the_whole_grid_is_full_attention():
    module = build(axes=2, kernel=(4, 5))
    full = MultiHead(12, heads=3, bias=True).double()
    full.load_state_dict(module.state_dict())
    x = tokens(4, 5)
    torch.testing.assert_close(module(x, grid=(4, 5)), full(x))


def test_a_causal_line_with_a_kernel_of_its_length_is_causal_attention():
    module = build(axes=1, kernel=9, causal=True)
    full = MultiHead(12, heads=3, bias=True, causal=True).double()
    full.load_state_dict(module.state_dict())
    x = tokens(9)
    assert module.causal
    torch.testing.assert_close(module(x, grid=(9,)), full(x))


def test_a_stride_of_the_kernel_is_blocked_attention():
    module = build(kernel=4, stride=4)
    full = MultiHead(12, heads=3, bias=True).double()
    full.load_state_dict(module.state_dict())
    x = tokens(8, 12)
    torch.testing.assert_close(module(x, grid=(8, 12)), full(x, pattern=Blocks((8, 12), 4)))


def test_a_kernel_of_one_is_the_value():
    module = build(kernel=1)
    x = tokens(3, 4)
    _, _, v = module.qkv(x)
    torch.testing.assert_close(module(x, grid=(3, 4)), module.merge(v))


def test_dilation_is_attention_within_each_residue_by_itself():
    module = build(kernel=3, dilation=2)
    x = tokens(8, 6)
    maps = x.unflatten(1, (8, 6))
    wanted = torch.zeros_like(maps)
    near = build(kernel=3)
    near.load_state_dict(module.state_dict())
    for i, j in itertools.product(range(2), range(2)):
        part = maps[:, i::2, j::2]
        wanted[:, i::2, j::2] = near(part.flatten(1, 2), grid=(4, 3)).unflatten(1, (4, 3))
    torch.testing.assert_close(module(x, grid=(8, 6)), wanted.flatten(1, 2))


def test_what_moves_by_one_moves_the_output_by_one_where_no_window_is_clamped():
    module = build(kernel=3)
    big = tokens(9, 10, batch=1).unflatten(1, (9, 10))
    at = [module(big[:, :, s : s + 9].flatten(1, 2), grid=(9, 9)).unflatten(1, (9, 9)) for s in (0, 1)]
    torch.testing.assert_close(at[0][:, :, 2:8], at[1][:, :, 1:7])


def test_a_causal_axis_never_looks_ahead_and_the_others_do():
    module = build(kernel=3, stride=(2, 1), causal=(True, False))
    assert not module.causal
    x = tokens(6, 5, batch=1)
    other = x.clone()
    other[:, 3 * 5 :] += 1
    a, b = (module(t, grid=(6, 5)).unflatten(1, (6, 5)) for t in (x, other))
    torch.testing.assert_close(a[:, :3], b[:, :3])
    other = x.clone().unflatten(1, (6, 5))
    other[:, 0, 4] += 1
    assert not torch.equal(module(other.flatten(1, 2), grid=(6, 5))[:, 3], a[:, 0, 3])


def test_extra_tokens_join_the_neighbors_in_one_softmax():
    module = build(kernel=3)
    x, extra = tokens(5, 6), tokens(4)
    q, k, v = module.qkv(torch.cat([x, extra], 1))
    seen = torch.cat([Neighborhood((5, 6), 3).matrix(30), torch.ones(30, 4, dtype=torch.bool)], 1)
    heads = F.scaled_dot_product_attention(q[:, :, :30], k, v, attn_mask=seen)
    torch.testing.assert_close(module(x, grid=(5, 6), extra=extra), module.merge(heads))


def test_dropout_drops_neighbors_and_extra_tokens_alike_while_training():
    module = build(kernel=3, dropout=0.5).train()
    x, extra = tokens(5, 6, batch=1), tokens(4, batch=1)
    for more in ({}, {"extra": extra}):
        mean = torch.stack([module(x, grid=(5, 6), **more) for _ in range(400)]).mean(0)
        assert not torch.equal(module(x, grid=(5, 6), **more), module(x, grid=(5, 6), **more))
        exact = module.eval()(x, grid=(5, 6), **more)
        module.train()
        assert (mean - exact).square().mean() < 0.02 * exact.square().mean()


def test_grouped_heads_and_a_narrower_pattern_are_taken():
    module = build(heads=4, kv_heads=2, kernel=3)
    x = tokens(5, 6)
    halves = Regions(torch.arange(30) % 6 // 3)
    seen = Neighborhood((5, 6), 3).matrix(30) & halves.matrix(30)
    q, k, v = module.qkv(x)
    wanted = module.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True))
    torch.testing.assert_close(module(x, grid=(5, 6), pattern=halves), wanted)


def test_a_grid_that_is_too_small_is_refused_padded_or_met_halfway():
    grid = (3, 9)
    x = tokens(*grid)
    with pytest.raises(ValueError, match="kernel must fit the grid, got 5 on axis 0 of length 3"):
        build(kernel=5)(x, grid=grid)
    shrunk = build(kernel=5, dilation=2, small="shrink")
    assert shrunk.neighborhood(grid) == Neighborhood(grid, (3, 5), 1)
    assert shrunk(x, grid=grid).shape == x.shape
    # Padding: the tokens that fill up the grid are zero before the projection, so they are keys of their bias.
    padded = build(kernel=5, small="pad")
    filled = F.pad(x.unflatten(1, grid), (0, 0, 0, 0, 0, 2)).flatten(1, 2)
    wanted = build(kernel=5)(filled, grid=(5, 9)).unflatten(1, (5, 9))[:, :3].flatten(1, 2)
    torch.testing.assert_close(padded(x, grid=grid), wanted)
    assert not torch.equal(padded(x, grid=grid), shrunk(x, grid=grid))


def test_the_weights_to_look_at_are_those_that_mix_the_values():
    module = build(kernel=3, dilation=2, relative=True)
    x = tokens(6, 7)
    weights = module.weights(x, grid=(6, 7))
    assert torch.equal(weights[0, 0] > 0, Neighborhood((6, 7), 3, 2).matrix(42))
    _, _, v = module.qkv(x)
    torch.testing.assert_close(module.merge(weights @ v), module(x, grid=(6, 7)))


def test_the_view_grows_by_the_window_and_exponentially_where_dilation_alternates():
    # Reach of one layer (w − 1)/2 · dilation to each side; of several, their sum. arXiv 2209.15001.
    line = 81
    near = [Neighborhood((line,), 3).reach(depth, line)[40].sum().item() for depth in (1, 2, 4)]
    assert near == [3, 5, 9]
    reach = torch.eye(line, dtype=torch.bool)[40].double()
    for depth, dilation in enumerate((1, 3, 9, 27), start=1):
        reach = reach @ Neighborhood((line,), 3, dilation).matrix(line).double()
        assert int((reach > 0).sum()) == 3**depth


def test_dilation_finds_what_lies_far_away_at_the_same_cost():
    x = torch.randn(1, 32 * 32, 12)
    near, far = (build(kernel=3, dilation=d).float() for d in (1, 8))
    costs = [count_flops(lambda m=m: m(x, grid=(32, 32))) for m in (near, far)]
    assert costs[1] <= 1.5 * costs[0]
    changed = x.clone()
    changed[:, 8] += 1
    assert torch.equal(near(x, grid=(32, 32))[:, 0], near(changed, grid=(32, 32))[:, 0])
    assert not torch.equal(far(x, grid=(32, 32))[:, 0], far(changed, grid=(32, 32))[:, 0])


@pytest.mark.parametrize("relative", [False, True])
def test_training_costs_grow_with_the_tokens(relative):
    module = build(kernel=4, relative=relative).float()
    counts = []
    for side in (32, 64):
        x = torch.randn(1, side * side, 12)
        counts.append(count_flops(lambda x=x, s=side: module(x, grid=(s, s)).sum().backward()))
    assert fit_growth([1024, 4096], counts) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(kernel=0), "kernel must be integers of at least 1"),
        (lambda: build(kernel=(3, 3, 3)), "kernel must be one integer or one for each of the 2 axes"),
        (lambda: build(kernel=3, stride=4), "stride must be at most kernel, got 4 and 3"),
        (lambda: build(kernel=3, causal=(True,)), "causal must be one bool or one for each of the 2 axes"),
        (lambda: build(small="crop"), "small must be error, pad or shrink, got 'crop'"),
        (lambda: build(kernel=3, stride=2, relative=True), "relative needs stride 1 and no causal axis"),
        (lambda: build(kernel=3)(tokens(5, 6)), "grid must be given"),
        (lambda: build(kernel=3)(tokens(5, 6), grid=(5, 5)), "grid must multiply to the number of tokens 30"),
        (lambda: build(kernel=3)(tokens(5, 6), grid=(30,)), "grid must have 2 axes"),
        (lambda: build(kernel=3)(tokens(5, 6), tokens(5, 6), grid=(5, 6)), "takes no context"),
        (lambda: build(kernel=3)(tokens(5, 6), grid=(5, 6), extra=tokens(3, dim=11)), r"\(B, N, 12\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "keywords",
    [
        dict(kernel=3),
        dict(kernel=2, dilation=2, kv_heads=2),
        dict(kernel=3, stride=2, scale=0.7),
        dict(kernel=5, small="shrink"),
    ],
    ids=["plain", "dilated, grouped", "strided, scaled", "shrunk"],
)
def test_streams_where_every_axis_is_causal(keywords):
    grid, m = (4, 5), build(heads=4, causal=True, **keywords)
    x = tokens(*grid)
    state, out = m.initial_state(2), []
    with torch.no_grad():
        for piece in x.split([3, 1, 1, 15], 1):
            y, state = m(piece, grid=grid, state=state)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), m(x, grid=grid))
    with pytest.raises(ValueError, match="causal=True"):
        build(causal=(True, False), kernel=3).initial_state(2)
