"""Routes choose what they say they choose."""

import itertools

import pytest
import torch

from attnlab.attend import attend, pose
from attnlab.patterns import Causal, Full, Window
from attnlab.routing import Clusters, Partition, Routed, ThresholdBlocks, TopKBlocks, block_scores, kmeans


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
