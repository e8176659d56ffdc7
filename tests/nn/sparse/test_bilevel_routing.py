"""Bi-level routing attention: its definition region by region, its limits, its gradients, and what it is for."""

import pytest
import torch
import torch.nn.functional as F

from attnlab.cost import count_flops
from attnlab.nn.sparse.bilevel_routing import BilevelRouting

GRID = (6, 9)
OPTIONS = {
    "plain": {},
    "narrow": {"qk_dim": 4},
    "two heads' scale": {"scale": 0.3},
    "average to 2": {"pool": "avg", "pool_to": 2},
    "greatest to 1": {"pool": "max", "pool_to": 1},
    "average by 2": {"pool": "avg", "pool_ratio": 2},
    "greatest by 2": {"pool": "max", "pool_ratio": 2},
    "soft": {"soft_routing": True},
    "soft with a router": {"soft_routing": True, "diff_routing": True, "param_routing": True},
    "straight through": {"diff_routing": True, "param_routing": True},
    "no convolution": {"local": 0},
    "no output map": {"output": False},
}


def module(**keywords):
    torch.manual_seed(0)
    made = BilevelRouting(8, **{"heads": 2, "regions": 3, "topk": 2, "local": 3, **keywords}).double()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return made


def by_definition(m, x, grid):
    """One query region after the other, with nothing batched but the tokens of a region."""
    n, (height, width) = m.regions, grid
    maps = F.pad(x.unflatten(1, grid), (0, 0, 0, -width % n, 0, -height % n))
    tall, wide = maps.shape[1] // n, maps.shape[2] // n
    out = torch.zeros_like(maps)
    for image, result in zip(maps, out, strict=True):
        q, k, v = m.wqkv(image).split([m.qk_dim, m.qk_dim, m.dim], -1)
        cut = lambda t, r: t[r // n * tall :, r % n * wide :][:tall, :wide]  # noqa: E731
        means = [torch.stack([cut(t, r).mean((0, 1)) for r in range(n * n)]) for t in (q, k)]
        scores = m.scale * m.router(means[0]) @ m.router(means[1]).T
        pooled = [pool(m, torch.cat([k, v], -1), cut, r) for r in range(n * n)]
        for region in range(n * n):
            best, chosen = scores[region].topk(m.topk)
            share = best.softmax(0) if m.soft_routing else torch.ones(m.topk)
            keys = torch.cat([w * pooled[c] for w, c in zip(share, chosen.tolist(), strict=True)])
            queries = cut(q, region).flatten(0, 1)
            for head in range(m.heads):
                d, e = m.qk_dim // m.heads, m.dim // m.heads
                mine, values = slice(d * head, d * head + d), slice(m.qk_dim + e * head, m.qk_dim + e * head + e)
                weights = (m.scale * queries[:, mine] @ keys[:, mine].T).softmax(-1)
                cut(result, region)[..., e * head : e * head + e] = (weights @ keys[:, values]).unflatten(
                    0, (tall, wide)
                )
        if m.lepe is not None:
            result += m.lepe(v.movedim(-1, 0)[None])[0].movedim(0, -1)
    return m.wo(out[:, :height, :width]).flatten(1, 2)


def pool(m, kv, cut, region):
    """The keys and values of a region, (fewer tokens, D + C)."""
    maps = cut(kv, region).movedim(-1, 0)[None]
    if m.pool is None:
        return maps.flatten(2)[0].T
    if m.pool_to is None:
        made = {"avg": F.avg_pool2d, "max": F.max_pool2d}[m.pool](maps, m.pool_ratio)
    else:
        made = {"avg": F.adaptive_avg_pool2d, "max": F.adaptive_max_pool2d}[m.pool](maps, m.pool_to)
    return made.flatten(2)[0].T


@pytest.mark.parametrize("grid", [GRID, (7, 8)], ids=["exact", "padded"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_its_definition(options, grid):
    m, x = module(**options), torch.randn(2, grid[0] * grid[1], 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(m(x, grid=grid), by_definition(m, x, grid))


def test_both_ways_to_compute_agree_in_gradients_too():
    m = module()
    x = torch.randn(2, 54, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for weights in (False, True):
        y = m.details(x, GRID, weights=weights)[0]
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, *m.parameters()))))
    for lists, gathered in zip(*found, strict=True):
        torch.testing.assert_close(lists, gathered)


def test_the_attention_weights_are_those_of_the_output():
    m = module(local=0)
    x = torch.randn(1, 54, 8, dtype=torch.float64)
    _, choice, attention = m.details(x, GRID)
    assert attention.shape == (9, 2, 6, 12)
    torch.testing.assert_close(attention.sum(-1), torch.ones(9, 2, 6, dtype=torch.float64))
    assert choice.regions.shape == choice.weights.shape == (1, 9, 2)
    assert (choice.weights[..., 0] >= choice.weights[..., 1]).all()


def test_every_region_chosen_is_full_attention():
    m = module(topk=9, local=0)
    x = torch.randn(2, 54, 8, dtype=torch.float64)
    q, k, v = m.wqkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    full = m.wo(F.scaled_dot_product_attention(q, k, v, scale=8**-0.5).transpose(1, 2).flatten(2))
    torch.testing.assert_close(m(x, grid=GRID), full)
    with_local = module(regions=1, topk=1)
    added = with_local.lepe(with_local.wqkv(x)[..., 16:].transpose(1, 2).unflatten(2, GRID)).flatten(2).transpose(1, 2)
    full = F.scaled_dot_product_attention(
        *with_local.wqkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4), scale=8**-0.5
    )
    torch.testing.assert_close(with_local(x, grid=GRID), with_local.wo(full.transpose(1, 2).flatten(2) + added))


def test_permuted_regions_give_permuted_outputs_without_the_convolution():
    m = module(local=0)
    x = torch.randn(2, 9, 6, 8, dtype=torch.float64)  # (B, region, token, C)
    order = torch.randperm(9)
    raster = lambda t: t.unflatten(2, (2, 3)).unflatten(1, (3, 3)).transpose(2, 3).flatten(1, 4)  # noqa: E731
    torch.testing.assert_close(m(raster(x[:, order]), grid=GRID), raster(regions(m(raster(x), grid=GRID))[:, order]))


def regions(y):
    return y.unflatten(1, (3, 2, 3, 3)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def test_the_routing_is_differentiable_only_if_asked_to_be():
    x = torch.randn(2, 54, 8, dtype=torch.float64)
    for options, differentiable in (({}, False), ({"soft_routing": True}, False), ({"diff_routing": True}, True)):
        assert module(**options).details(x, GRID)[1].weights.requires_grad == differentiable
    for soft in (True, False):
        m = module(diff_routing=True, param_routing=True, soft_routing=soft)
        m(x, grid=GRID).square().sum().backward()
        assert m.router.weight.grad.abs().max() > 0


def test_straight_through_routing_changes_only_gradients():
    x = torch.randn(2, 54, 8, dtype=torch.float64)
    torch.testing.assert_close(module(diff_routing=True)(x, grid=GRID), module()(x, grid=GRID))


def test_flops_are_those_of_the_chosen_regions():
    m, n, dim = BilevelRouting(32, heads=2, regions=8, topk=4, local=0), 32 * 32, 32
    flops = count_flops(m, torch.randn(1, n, dim), grid=(32, 32))
    projections, routing, attention = 2 * n * dim * 4 * dim, 2 * 64 * 64 * dim, 2 * n * 4 * (n // 64) * 2 * dim
    assert flops == projections + routing + attention


def test_untrained_routing_finds_the_regions_of_the_same_object():
    # Two kinds of things on a 7×7 board of regions: one vector each, with noise of the same size. A region that
    # looks like its things should choose regions with the same thing: by chance 4 would hold 12/49 of them.
    torch.manual_seed(0)
    kinds = torch.randn(2, 32)
    m = BilevelRouting(32, heads=4, regions=7, topk=4, local=0)
    with torch.no_grad():
        m.wqkv.weight[32:64] = m.wqkv.weight[:32]  # keys like queries
    hits = total = 0
    for _ in range(8):
        board = torch.zeros(49, dtype=torch.long)
        board[torch.randperm(49)[:24]] = torch.tensor([1] * 12 + [2] * 12)
        regions = torch.randn(49, 16, 32)
        for kind in (1, 2):
            regions[board == kind] += kinds[kind - 1]
        maps = regions.view(7, 7, 4, 4, 32).transpose(1, 2).reshape(1, 28 * 28, 32)
        chosen = m.details(maps, (28, 28), weights=False)[1].regions[0]
        for region in (board > 0).nonzero()[:, 0].tolist():
            hits += int((board[chosen[region]] == board[region]).sum())
            total += 4
    assert hits / total > 3 * 12 / 49


@pytest.mark.parametrize(("keywords", "words"), [
    ({"topk": 10}, "topk must lie between 1 and regions² = 9, got 10"),
    ({"heads": 3}, "heads must divide dim = 8, got 3"),
    ({"qk_dim": 3}, "heads must divide dim = 3, got 2"),
    ({"pool": "mean"}, "pool must be None, 'avg' or 'max', got 'mean'"),
    ({"param_routing": True}, "param_routing=True needs diff_routing=True"),
    ({"local": 4}, "local must be 0 or an odd kernel size, got 4"),
    ({"causal": True}, "only causal=False exists"),
])  # fmt: skip
def test_bad_arguments_are_named(keywords, words):
    with pytest.raises(ValueError, match=words):
        module(**keywords)


def test_a_grid_that_regions_do_not_divide_may_be_refused():
    with pytest.raises(ValueError, match=r"grid must be a multiple of regions=3 on both sides .* got \(7, 8\)"):
        module(auto_pad=False)(torch.randn(1, 56, 8, dtype=torch.float64), grid=(7, 8))
