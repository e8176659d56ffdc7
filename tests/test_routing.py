"""Routes choose what they say, their fast path equals the oracle, and costs what they promise."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnlab.attend import attend, explain, pose
from attnlab.cost import count_flops, fit_growth
from attnlab.patterns import Causal, Full, Window
from attnlab.routing import Clusters, Partition, Routed, ThresholdBlocks, TopKBlocks, block_scores, kmeans
from attnlab.weightings import Softmax


def heads(n=40, *, batch=2, h=4, kv=2, dim=8, value_dim=6, dtype=torch.float64, size=1.0, nk=None):
    k_shape = (batch, kv, nk or n)
    q, k = size * torch.randn(batch, h, n, dim, dtype=dtype), size * torch.randn(*k_shape, dim, dtype=dtype)
    return q, k, torch.randn(*k_shape, value_dim, dtype=dtype)


# Blocks


@pytest.mark.parametrize("lengths", [(32,), (35,), (3,), (10, 1, 17, 8)])
def test_a_partition_cuts_each_sequence_into_blocks_and_knows_their_means(lengths):
    blocks = Partition.of(8, lengths)
    x = torch.randn(2, sum(lengths), 5, dtype=torch.float64)
    pieces = [p for s in x.split(lengths, 1) for p in s.split(8, 1)]
    assert blocks.numbers.tolist() == [p.shape[1] for p in pieces]
    torch.testing.assert_close(blocks.mean(x), torch.stack([p.mean(1) for p in pieces], 1))
    assert torch.equal(blocks.first(x), torch.stack([p[:, 0] for p in pieces], 1))
    owners = [i for i, p in enumerate(pieces) for _ in range(p.shape[1])]
    assert blocks.block(torch.arange(sum(lengths))).tolist() == owners


def test_blocks_may_have_any_sizes():
    blocks = Partition.sized((3, 1, 4))
    assert blocks.block(torch.arange(8)).tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    x = torch.randn(8, 2)
    torch.testing.assert_close(blocks.mean(x)[2], x[4:].mean(0))


def test_a_choice_is_a_pattern_that_equals_only_itself():
    table = torch.rand(2, 3, 2, 4) < 0.5
    routed = Routed(table, Partition.of(5, 10), Partition.of(3, 11))
    seen = routed.matrix(10, 11, batch=2, heads=3)
    for b, h, q, k in itertools.product(range(2), range(3), range(10), range(11)):
        assert seen[b, h, q, k] == table[b, h, q // 5, min(k // 3, 3)]
    assert routed.density() == pytest.approx(seen.double().mean().item())
    assert routed != Routed(table, routed.queries, routed.keys)
    assert "2 query blocks of 5, 4 key blocks of 3" in str(routed)


# What is chosen


def scores_of(route, q, k):
    return block_scores(q, k, *route.partitions(q.shape[2], k.shape[2]), first=route.causal)


@pytest.mark.parametrize("query_block", [None, 1, 12])
def test_top_k_takes_the_best_blocks_of_each_query_block(query_block):
    q, k, _ = heads()
    route = TopKBlocks(2, block=7, query_block=query_block)
    scores, table = scores_of(route, q, k), route.select(q, k).table
    assert table.sum(-1).unique().tolist() == [2]
    assert (scores.masked_fill(table, torch.inf).sort(-1).values[..., -2:] == torch.inf).all()
    least = scores.masked_fill(~table, torch.inf).amin(-1)
    assert (least >= scores.masked_fill(table, -torch.inf).amax(-1)).all()


def test_block_scores_are_mean_query_times_mean_key_of_the_heads_group():
    q, k, _ = heads()
    route = TopKBlocks(1, block=8, query_block=10)
    scores = scores_of(route, q, k)
    for b, h, t, c in itertools.product(range(2), range(4), range(4), range(5)):
        mean_q, mean_k = q[b, h, 10 * t : 10 * t + 10].mean(0), k[b, h // 2, 8 * c : 8 * c + 8].mean(0)
        torch.testing.assert_close(scores[b, h, t, c], mean_q @ mean_k)


@pytest.mark.parametrize("scope", ["head", "all"])
def test_a_shared_budget_is_spent_where_scores_are_best(scope):
    q, k, _ = heads()
    route = TopKBlocks(2, block=8, query_block=1, scope=scope)
    scores, table = scores_of(route, q, k), route.select(q, k).table
    over = (2, 3) if scope == "head" else (1, 2, 3)
    assert (table.sum(over) == 2 * 40 * (1 if scope == "head" else 4)).all()
    assert (scores.masked_fill(~table, torch.inf).amin(over) >= scores.masked_fill(table, -torch.inf).amax(over)).all()


def by_threshold(scores, own, threshold, scope):
    """The published selection for one batch element `(H, T, C)`, entry by entry, as a set of (h, t, c)."""
    groups = {}
    for h, t, c in itertools.product(*map(range, scores.shape)):
        key = {"query": (h, t), "block": c, "head": h, "all": 0}[scope]
        groups.setdefault(key, []).append((h, t, c))
    chosen = {(h, t, c) for h, t, c in itertools.product(*map(range, scores.shape)) if own[t, c]}
    for entries in groups.values():
        values = {e: scores[e].item() for e in entries}
        low, high = min(values.values()), max(values.values())
        share = {e: (x - low) / (high - low) for e, x in values.items()}
        total = sum(share.values()) + 1e-6
        got = sum(share[e] for e in entries if own[e[1:]])
        wanted = max(0.0, threshold - got / total)
        sum_of_others = 0.0
        for e in sorted((e for e in entries if not own[e[1:]]), key=lambda e: -share[e]):
            chosen.add(e)
            sum_of_others += share[e]
            if sum_of_others / total >= wanted:
                break
    return chosen


@pytest.mark.parametrize("scope", ["query", "block", "head", "all"])
@pytest.mark.parametrize("threshold", [0.05, 0.4, 0.8])
def test_a_threshold_takes_the_fewest_blocks_that_hold_the_share(scope, threshold):
    q, k, _ = heads(30, batch=1)
    route = ThresholdBlocks(threshold, block=6, query_block=1, scope=scope)
    table = route.select(q, k).table[0]
    own = torch.arange(30)[:, None] // 6 == torch.arange(5)
    assert {tuple(e) for e in table.nonzero().tolist()} == by_threshold(
        scores_of(route, q, k)[0], own, threshold, scope
    )


def test_a_greater_threshold_never_chooses_less():
    q, k, _ = heads()
    tables = [ThresholdBlocks(t, block=5, scope="head").select(q, k).table for t in (0.1, 0.3, 0.6, 0.9, 1.1)]
    assert all((a <= b).all() for a, b in itertools.pairwise(tables))
    assert tables[-1].all()


def test_ones_own_block_counts_as_chosen():
    q, k, _ = heads()
    table = TopKBlocks(2, block=8, query_block=4, own=True).select(q, k).table
    assert table[..., torch.arange(10), torch.arange(10) // 2].all()
    assert (table.sum(-1) == 2).all()


def test_heads_may_choose_together():
    q, k, _ = heads()
    route = TopKBlocks(2, block=8, per_head=False)
    table = route.select(q, k).table
    assert table.shape[:2] == (2, 1)
    best = scores_of(route, q, k).sum(1, keepdim=True).topk(2).indices
    assert torch.equal(table, torch.zeros_like(table).scatter_(-1, best, True))


@pytest.mark.parametrize("route", [
    TopKBlocks(2, block=6, causal=True),
    TopKBlocks(3, block=6, query_block=1, causal=True),
    ThresholdBlocks(0.4, block=4, query_block=8, causal=True),
])  # fmt: skip
def test_a_causal_route_does_not_hear_of_the_future(route):
    q, k, v = heads()
    for cut in (1, 13, 39):
        changed = [torch.cat([x[:, :, :cut], torch.randn_like(x[:, :, cut:])], 2) for x in (q, k, v)]
        torch.testing.assert_close(attend(*changed, route=route)[:, :, :cut], attend(q, k, v, route=route)[:, :, :cut])
    everything = TopKBlocks(99, block=route.block, query_block=route.query_block, causal=True)
    torch.testing.assert_close(attend(q, k, v, route=everything), attend(q, k, v, pattern=Causal()))


@pytest.mark.parametrize("make", [
    lambda lengths: TopKBlocks(2, block=5, query_block=1, lengths=lengths),
    lambda lengths: ThresholdBlocks(0.3, block=5, query_block=3, lengths=lengths),
])  # fmt: skip
def test_packed_sequences_are_as_if_alone(make):
    q, k, v = heads()
    packed = attend(q, k, v, route=make((11, 29)))
    alone = [attend(*(x[:, :, s] for x in (q, k, v)), route=make(None)) for s in (slice(11), slice(11, 40))]
    torch.testing.assert_close(packed, torch.cat(alone, 2))


def test_nothing_beyond_own_blocks_may_mean_everything():
    q, k, v = heads()
    q[0] = -k[0].repeat_interleave(2, 0).mean(2, keepdim=True)
    for route, pattern in ((TopKBlocks(1, block=8, own=True, released=True), Full()), (TopKBlocks(5, block=8), Full())):
        torch.testing.assert_close(attend(q, k, v, route=route), attend(q, k, v, pattern=pattern))
    own = TopKBlocks(1, block=8, own=True).select(q, k).table
    assert torch.equal(own, torch.eye(5, dtype=torch.bool).expand(2, 4, 5, 5))


def test_a_threshold_never_reached_chooses_two_blocks_in_the_released_code():
    q, k, _ = heads()
    for scope, many in (("query", 3), ("head", 5)):
        chosen = ThresholdBlocks(1.5, block=8, scope=scope, released=True).select(q, k).table.sum(-1)
        assert chosen.max() == many  # the own block and two others, or all


def test_a_choice_passes_no_gradient_and_narrows_the_pattern():
    q, k, v = (x.requires_grad_() for x in heads())
    route = TopKBlocks(2, block=8)
    chosen = route.select(q, k)
    assert not chosen.table.requires_grad
    grads = [
        torch.autograd.grad(attend(q, k, v, **how).square().sum(), (q, k, v))
        for how in ({"route": route, "pattern": Window(9)}, {"pattern": chosen & Window(9), "backend": "reference"})
    ]
    for ours, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(ours, wanted)


# Clusters


def test_clusters_have_equal_sizes_and_nearest_members():
    q, k, _ = heads()
    centroids = torch.randn(2, 4, 8)
    clustered = Clusters(4, centroids=centroids).select(q, k)
    assert (clustered.keys.sum(2) == 10).all() and (clustered.queries.sum(2) == 10).all()
    near = torch.nn.functional.normalize(k, dim=-1) @ centroids.double().mT
    inside, outside = near.masked_fill(~clustered.keys, torch.inf), near.masked_fill(clustered.keys, -torch.inf)
    assert (inside.amin(2) >= outside.amax(2)).all()
    seen = clustered.matrix(40, 40, batch=2, heads=4)
    wanted = torch.einsum(
        "bhqc,bhkc->bhqk", clustered.queries.double(), clustered.keys.repeat_interleave(2, 1).double()
    )
    assert torch.equal(seen, wanted > 0)


def test_the_order_of_clusters_does_not_matter_and_one_is_full_attention():
    q, k, v = heads()
    centroids = torch.randn(2, 4, 8)
    one = attend(q, k, v, route=Clusters(4, centroids=centroids))
    torch.testing.assert_close(attend(q, k, v, route=Clusters(4, centroids=centroids[:, [2, 0, 3, 1]])), one)
    torch.testing.assert_close(attend(q, k, v, route=Clusters(1)), attend(q, k, v))
    assert Clusters(3, causal=True).select(q, k).matrix(40, batch=2, heads=4).tril().sum() > 0


def test_kmeans_finds_well_separated_directions():
    directions = torch.eye(4, 8)
    x = directions.repeat_interleave(10, 0) + 0.01 * torch.randn(40, 8)
    found = kmeans(torch.nn.functional.normalize(x, dim=-1), 4)
    assert (found @ directions.T).amax(0).min() > 0.99


# The fast path

ROUTES = [
    TopKBlocks(2, block=16),
    TopKBlocks(3, block=4),
    TopKBlocks(2, block=7, query_block=16),
    TopKBlocks(2, block=7, query_block=1),
    TopKBlocks(3, block=16, causal=True),
    TopKBlocks(3, block=5, query_block=1, causal=True),
    TopKBlocks(3, block=5, query_block=17, causal=True, per_head=False),
    ThresholdBlocks(0.3, block=16, scope="head"),
    ThresholdBlocks(0.4, block=8, query_block=1, lengths=(13, 37)),
    ThresholdBlocks(0.4, block=20, lengths=(33, 17)),
    Clusters(4),
    Clusters(5, size=13),
    Clusters(3, causal=True),
]


@pytest.mark.parametrize("size", [1.0, 30.0], ids=["", "large scores"])
@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_the_lists_equal_the_oracle_in_output_lse_and_gradients(route, size):
    tensors = tuple(x.requires_grad_() for x in heads(50, size=size))
    chosen = route.select(*tensors[:2])
    found = []
    for backend in ("routed", "reference"):
        out, lse = attend(*tensors, pattern=chosen, return_lse=True, backend=backend)
        torch.manual_seed(1)
        loss = (out * torch.randn_like(out)).sum() + (lse.masked_fill(lse.isinf(), 0) * torch.randn_like(lse)).sum()
        found.append((out, lse, *torch.autograd.grad(loss, tensors)))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9 * size)


@pytest.mark.parametrize("size", [1.0, 30.0], ids=["", "large scores"])
@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_torchs_fused_backward_of_each_tile_adds_up_to_the_whole(route, size):
    # It is taken where values are as wide as keys and nothing but the output is differentiated.
    tensors = tuple(x.requires_grad_() for x in heads(50, size=size, value_dim=8))
    pattern = route.select(*tensors[:2]) & Window(20, causal=False)
    found = []
    for backend in ("routed", "reference"):
        out = attend(*tensors, pattern=pattern, backend=backend)
        torch.manual_seed(1)
        found.append(torch.autograd.grad((out * torch.randn_like(out)).sum(), tensors))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9 * size)


@pytest.mark.parametrize("weighting", ["sigmoid", "relu", "none", Softmax(off=1.0)], ids=str)
@pytest.mark.parametrize("route", [ROUTES[4], ROUTES[5], ROUTES[-2]], ids=str)
def test_any_weighting_equals_the_oracle(route, weighting):
    tensors = tuple(x.requires_grad_() for x in heads(50))
    chosen = route.select(*tensors[:2])
    found = []
    for backend in ("routed", "reference"):
        out = attend(*tensors, pattern=chosen, weighting=weighting, backend=backend)
        found.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weighting", ["softmax", "sigmoid"])
def test_dropout_is_the_same_forward_and_backward_and_keeps_the_mean(weighting):
    q, k, v = heads(48, batch=1, h=2, kv=1)
    chosen = TopKBlocks(2, block=16).select(q, k)

    def dropped(v):
        torch.manual_seed(3)
        return attend(q, k, v, pattern=chosen, weighting=weighting, dropout=0.4, backend="routed")

    # The output is linear in the values, so its gradient gives it back if the same weights were dropped.
    v.requires_grad_()
    out = dropped(v)
    (gradient,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close((gradient * v).sum(), out.sum())
    q.requires_grad_()
    slope = torch.autograd.grad(dropped(v).square().sum(), q)[0][0, 1, 20, 3]
    step = torch.zeros_like(q)
    step[0, 1, 20, 3] = 1e-5
    with torch.no_grad():
        q += step
        more = dropped(v).square().sum()
        q -= 2 * step
        less = dropped(v).square().sum()
        q += step
    torch.testing.assert_close((more - less) / 2e-5, slope, rtol=1e-6, atol=1e-6)
    plain = attend(q, k, v, pattern=chosen, weighting=weighting)
    mean = sum(attend(q, k, v, pattern=chosen, weighting=weighting, dropout=0.4, backend="routed") for _ in range(300))
    assert (mean / 300 - plain).abs().mean() < 0.1 * plain.abs().mean()


@pytest.mark.parametrize("query_block", [1, 16])
def test_queries_that_see_nothing_get_zeros_and_no_gradient(query_block):
    q, k, v = (x.requires_grad_() for x in heads(48))
    table = torch.rand(2, 4, 48 // query_block, 6) < 0.3
    table[0, 1, 2] = False
    routed = Routed(table, Partition.of(query_block, 48), Partition.of(8, 48))
    out, lse = attend(q, k, v, pattern=routed, return_lse=True, backend="routed")
    rows = slice(2 * query_block, 3 * query_block)
    assert not out[0, 1, rows].any() and (lse[0, 1, rows] == -torch.inf).all()
    torch.testing.assert_close(out, attend(q, k, v, pattern=routed, backend="reference"))
    grads = torch.autograd.grad(out.square().sum() + lse[0, 0].sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads) and not grads[0][0, 1, rows].any()


@pytest.mark.parametrize("h", [1, 2])
def test_tensors_may_lie_in_memory_in_any_order(h):
    x = torch.randn(1, 48, 3, h, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = x.permute(2, 0, 3, 1, 4)
    for route in (TopKBlocks(2, block=16), TopKBlocks(2, block=5, query_block=1)):
        chosen = route.select(q, k)
        found = []
        for backend in ("routed", "reference"):
            out = attend(q, k, v, pattern=chosen, backend=backend)
            found.append((out, *torch.autograd.grad(out.square().sum(), x, retain_graph=True)))
        for ours, wanted in zip(*found, strict=True):
            torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_lower_precision_is_computed_in_float32(dtype, error):
    q, k, v = heads(64, dtype=dtype)
    chosen = TopKBlocks(2, block=16).select(q, k)
    out = attend(q, k, v, pattern=chosen, backend="routed")
    wanted = attend(q.double(), k.double(), v.double(), pattern=chosen, backend="reference")
    assert out.dtype == dtype
    assert (out - wanted).abs().max() < error * wanted.abs().max()


@pytest.mark.parametrize("seed", range(12))
def test_any_table_of_any_blocks_equals_the_oracle(seed):
    random = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=random))  # noqa: E731
    nq, nk, kv, repeat = draw(1, 70), draw(1, 70), draw(1, 3), draw(1, 3)
    q, k, v = heads(nq, nk=nk, batch=draw(1, 3), h=kv * repeat, kv=kv)
    cuts = [Partition.of(draw(1, 40), nq), Partition.of(draw(1, 40), nk)]
    table = torch.rand(q.shape[0], q.shape[1], *(c.count for c in cuts), generator=random) < 0.4
    pattern = Routed(table, *cuts)
    pattern = pattern & Window(draw(1, 30), causal=False) if seed % 3 else pattern
    out = attend(q, k, v, pattern=pattern, backend="routed")
    torch.testing.assert_close(out, attend(q, k, v, pattern=pattern, backend="reference"))


def test_only_the_chosen_blocks_are_computed():
    n, block, count, h, dim, value_dim = 512, 32, 3, 2, 8, 6
    q, k, v = heads(n, batch=1, h=h, kv=1, dtype=torch.float32)
    route = TopKBlocks(count, block=block)
    gate = 2 * h * (n // block) ** 2 * dim
    attention = 2 * h * n * count * block * (dim + value_dim)
    assert count_flops(lambda: attend(q, k, v, route=route)) == gate + attention
    # Single queries are padded to tiles of 128 per block: at most one tile too many for each block and head.
    single = TopKBlocks(count, block=block, query_block=1)
    gate = 2 * h * n * (n // block) * dim
    extra = count_flops(lambda: attend(q, k, v, route=single)) - gate - attention
    assert 0 <= extra <= 2 * h * (n // block) * 128 * block * (dim + value_dim)
    # One dense product costs 1, and its gradients 2 more; recomputed scores make it 2.5 in all.
    for x in (q, k, v):
        x.requires_grad_()
    train = count_flops(lambda: attend(q, k, v, route=route).sum().backward())
    products = 2 * h * n * count * block
    assert train == 2 * h * (n // block) ** 2 * dim + products * (2 * (dim + value_dim) + 2 * dim + value_dim)


def test_cost_grows_linearly_with_blocks_of_fixed_size():
    route = TopKBlocks(8, block=64)
    sizes = (4096, 8192, 16384)
    costs = [
        count_flops(lambda n=n: attend(*heads(n, batch=1, h=1, kv=1, dtype=torch.float32), route=route)) for n in sizes
    ]
    # 4·512·N·D for the attention and 2·(N/64)²·D for the choice: 3 % of it at 16,384.
    assert 1.0 <= fit_growth(sizes, costs) <= 1.03


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes():
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("query_block", [None, 1])
def test_memory_is_that_of_the_tokens_and_one_step(query_block):
    n = 8192
    q, k, v = (x.requires_grad_() for x in heads(n, batch=1, h=2, kv=1, dim=16, value_dim=16, dtype=torch.float32))
    with Largest() as largest:
        attend(q, k, v, route=TopKBlocks(4, block=128, query_block=query_block), backend="routed").sum().backward()
    tokens, step, table = 2 * n * 16, 2**20, 2 * n * (n // 128)
    assert largest.numel <= max(tokens, step, table) + 2**17, f"{largest.numel:,} numbers; n² is {n * n:,}"


def test_the_planner_takes_the_lists_where_they_save_work():
    q, k, v = heads(2048, batch=1, dtype=torch.float32)
    found = explain(q, k, v, route=TopKBlocks(2, block=64))
    assert found.choice == "routed"
    assert "routed" in str(found)


# Errors


@pytest.mark.parametrize(("make", "words"), [
    (lambda: TopKBlocks(0, block=8), "count must be at least 1, got 0"),
    (lambda: TopKBlocks(1, block=0), "block must be at least 1, got 0"),
    (lambda: TopKBlocks(1, block=8, query_block=-1), "query_block must be at least 1, got -1"),
    (lambda: TopKBlocks(1, block=8, scope="block"), "scope must be query, head or all, got 'block'"),
    (lambda: ThresholdBlocks(-0.1, block=8), "threshold must be 0 or more, got -0.1"),
    (lambda: ThresholdBlocks(0.1, block=8, scope="each"), "scope must be query, block, head or all, got 'each'"),
    (lambda: ThresholdBlocks(0.1, block=8, scope="all", causal=True), "causal=True needs scope='query'"),
    (lambda: Clusters(0), "count must be at least 1, got 0"),
    (lambda: Partition.of(4, (3, 0)), "lengths must be one or more positive integers"),
    (lambda: Routed(torch.ones(1, 1, 2, 2).bool(), Partition.of(4, 8), Partition.of(4, 12)), r"\(B, H, 2, 3\)"),
])  # fmt: skip
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(("route", "words"), [
    (TopKBlocks(1, block=8, lengths=(20, 19)), "lengths must sum to the number of queries 40"),
    (Clusters(3, centroids=torch.zeros(2, 3, 5)), r"centroids must have shape \(Hkv, count, D\) = \(2, 3, 8\)"),
    (Clusters(99), "count must be at most the number of tokens 40, got 99"),
    (TopKBlocks(1, block=8).select(*heads(24)[:2]), "chosen for 24 queries and 24 keys, but there are 40"),
])  # fmt: skip
def test_what_does_not_fit_the_tensors_is_named(route, words):
    q, k, v = heads()
    with pytest.raises(ValueError, match=words):
        pose(q, k, v, route=route)
