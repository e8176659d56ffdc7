"""Proxy attention: the steps one by one, its limits, what per-head budgets and token-level scores are for."""

import math

import pytest
import torch
import torch.nn.functional as F

from attnlab import build
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.proxy import ProxyAttention
from attnlab.patterns import Causal, Window
from attnlab.positions import ALiBi, Rotary
from attnlab.routing import Partition, ProxyHeads


def heads(n=50, *, h=8, kv=4, dim=8, size=1.5, batch=2):
    return [size * torch.randn(batch, m, n, dim, dtype=torch.float64) for m in (h, kv, kv)]


def block_mask(q, k, *, gamma, block, groups, stride_q, stride_k, least, diagonal=True, first=True):
    """The masks `(B, H, blocks, blocks)`, block by block and head by head."""
    batch, h, n, d = q.shape
    kv, count = k.shape[1], math.ceil(n / block)
    of_block = [range(c * block, min(n, (c + 1) * block)) for c in range(count)]
    mask = torch.zeros(batch, h, count, count, dtype=torch.bool)
    for b in range(batch):
        proxies = []
        for g in range(groups):
            mine = [i for i in range(h) if i * groups // h == g]
            of_keys = sorted({i * kv // h for i in mine})
            pq = sum(q[b, i] for i in mine) / len(mine)
            pk = sum(k[b, i] for i in of_keys) / len(of_keys)
            scores = torch.full((n, n), -math.inf, dtype=torch.float64)
            for i in range(0, n, stride_q):
                for j in range(0, i + 1, stride_k):
                    scores[i, j] = pq[i] @ pk[j] / d**0.5
            proxies.append(scores.softmax(-1).nan_to_num(0.0))
        for i in range(h):
            key, rows = k[b, i * kv // h], of_block[-1]
            look = [(q[b, i, r] @ key[: r + 1].T / d**0.5).softmax(0) for r in rows]
            look = torch.stack([F.pad(w, (0, n - len(w))) for w in look])
            share = torch.stack([look[:, list(c)].mean() for c in of_block])
            share = (share / share.sum()).sort(descending=True).values
            budget = max(next(m for m in range(1, count + 1) if share[:m].sum() >= gamma), least)
            for m in range(count):
                proxy = proxies[i * groups // h]
                score = [max(proxy[r, j] for r in of_block[m] for j in of_block[c]) for c in range(m + 1)]
                best = sorted(range(m + 1), key=lambda c, score=score: -score[c])[:budget]
                mask[b, i, m, best] = True
                mask[b, i, m, m] |= diagonal
                mask[b, i, m, 0] |= first
    return mask


@pytest.mark.parametrize("options", [
    dict(gamma=0.8, groups=1, stride=4), dict(gamma=0.6, groups=2, stride=(2, 1)),
    dict(gamma=0.5, groups=4, stride=1, diagonal=False, first=False), dict(gamma=0.3, groups=1, stride=2, minimum=17),
])  # fmt: skip
def test_it_chooses_block_by_block_what_the_steps_say_and_attends_to_no_more(options):
    options = {"block": 8, "minimum": 1, **options}
    q, k, v = heads()
    route = ProxyHeads(**options)
    stride_q, stride_k = route.strides
    wanted = block_mask(
        q, k, gamma=route.gamma, block=8, groups=route.groups, stride_q=stride_q, stride_k=stride_k,
        least=-(-route.minimum // 8), diagonal=route.diagonal, first=route.first,
    )  # fmt: skip
    routed = route.select(q, k)
    assert torch.equal(routed.left.table, wanted)
    of = torch.arange(50) // 8
    seen = wanted[:, :, of][..., of] & torch.ones(50, 50, dtype=torch.bool).tril()
    m = ProxyAttention(64, heads=8, kv_heads=4, **options).double()
    ours = m.mix(q, k, v, x=v, pattern=Causal())
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True))


def test_without_averages_and_strides_the_scores_are_the_largest_weights_of_exact_attention():
    q, k, _ = heads(40, h=4)
    weights = (q @ k.mT * 8**-0.5).masked_fill(torch.ones(40, 40).triu(1).bool(), -math.inf).softmax(-1)
    largest = weights.unflatten(2, (5, 8)).unflatten(4, (5, 8)).amax((3, 5))
    scores = ProxyHeads(block=8, groups=4, stride=1).scores(q, k)
    torch.testing.assert_close(scores.exp(), largest)


def test_a_proxy_of_heads_that_are_alike_is_exact():
    q, k, _ = heads(h=1, kv=1)
    scores = ProxyHeads(block=8, stride=1).scores(q, k)
    alike = ProxyHeads(block=8, stride=1).scores(q.expand(-1, 8, -1, -1), k.expand(-1, 4, -1, -1))
    torch.testing.assert_close(alike, scores)


def test_long_texts_are_scored_in_steps_with_the_same_result(monkeypatch):
    q, k, _ = heads(70)
    route = ProxyHeads(block=8, stride=2)
    whole = route.scores(q, k)
    monkeypatch.setattr("attnlab.routing.proxy._STEP", 1)
    torch.testing.assert_close(route.scores(q, k), whole)


@pytest.mark.parametrize("options", [dict(gamma=1.0, minimum=0), dict(gamma=0.5, minimum=49)])
def test_a_share_of_one_and_a_text_within_the_minimum_are_causal_attention(options):
    m = ProxyAttention(32, heads=4, kv_heads=2, block=8, **options).double()
    plain = MultiHead(32, heads=4, kv_heads=2, causal=True).double()
    plain.load_state_dict(m.state_dict())
    x = torch.randn(2, 50, 32, dtype=torch.float64)
    torch.testing.assert_close(m(x), plain(x))
    torch.testing.assert_close(m(x, pattern=Window(9)), plain(x, pattern=Window(9)))
    q, k, _ = heads(49)
    assert ProxyHeads(block=8, **options).select(q, k).left.table[0, 0].equal(torch.ones(7, 7).tril().bool())


def test_a_larger_share_keeps_more_and_errs_less():
    q, k, v = heads(400, size=2.0)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    kept, errors = [], []
    for gamma in (0.3, 0.6, 0.9, 0.97, 1.0):
        route = ProxyHeads(gamma, block=16, stride=2, minimum=0, groups=4)
        table = route.select(q, k).left.table
        assert table.diagonal(dim1=2, dim2=3).all() and not table.triu(1).any()
        m = ProxyAttention(64, heads=8, kv_heads=4, gamma=gamma, block=16, stride=2, minimum=0, groups=4).double()
        kept.append(table.double().mean().item())
        errors.append((m.mix(q, k, v, x=v, pattern=Causal()) - exact).square().mean().item())
    assert kept == sorted(kept) and len(set(kept)) == 5
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-20


def test_each_head_takes_as_many_blocks_as_it_looks_at():
    # The first head looks at the key of its own block's first token, the second at everything alike.
    k = torch.eye(16, dtype=torch.float64).repeat_interleave(8, 0)[None, None]
    q = torch.cat([60 * k, torch.zeros_like(k)], 1)
    assert ProxyHeads(0.9, block=8, minimum=0).budgets(q, k).tolist() == [[1, 15]]
    assert ProxyHeads(0.9, block=8, minimum=24).budgets(q, k).tolist() == [[3, 15]]


def test_single_tokens_are_found_where_means_of_blocks_miss_them():
    # One key that answers the last queries lies among noise. Share of texts in which its block is among the best three
    # of 32, over five seeds: by the largest weight of a token always, by products of means of blocks 0.28 to 0.45, and
    # in as many where only every fourth key is scored.
    torch.manual_seed(0)
    found, by_means, strided = 0, 0, 0
    for _ in range(40):
        q, k = torch.randn(1, 1, 1024, 16), torch.randn(1, 1, 1024, 16)
        place, wanted = int(torch.randint(64, 960, ())), F.normalize(torch.randn(16), dim=0)
        k[0, 0, place] = 5 * wanted
        q[0, 0, 992:] = 4 * wanted + 0.5 * torch.randn(32, 16)
        ranks, fewer = (ProxyHeads(block=32, stride=(4, s)).scores(q, k)[0, 0, -1] for s in (1, 4))
        blocks = Partition.of(32, 1024)
        means = blocks.mean(k)[0, 0] @ blocks.mean(q)[0, 0, -1]
        found += place // 32 in ranks.topk(3).indices
        strided += place // 32 in fewer.topk(3).indices
        by_means += place // 32 in means.topk(3).indices
    assert found >= 38 and by_means <= 20 and strided <= 20


def test_a_trained_model_reads_a_prompt_sparsely_and_then_decodes_with_every_key():
    torch.manual_seed(0)
    options = dict(vocabulary=50, dim=32, depth=2, heads=4, kv_heads=2, hidden=48)
    dense = build("llama", **options).double()
    sparse, exact = (
        build("llama", mixer=("proxy_attention", dict(gamma=g, block=4, minimum=0)), **options).double()
        for g in (0.4, 1.0)
    )
    sparse.load_state_dict(dense.state_dict())
    exact.load_state_dict(dense.state_dict())
    ids = torch.randint(50, (2, 60))
    torch.testing.assert_close(exact(ids), dense(ids))
    assert not torch.allclose(sparse(ids), dense(ids))
    assert torch.equal(exact.generate(ids, 5, temperature=0), dense.generate(ids, 5, temperature=0))
    with torch.no_grad():
        logits, state = sparse(ids, sparse.initial_state(2, dtype=torch.float64))
        torch.testing.assert_close(logits, sparse(ids))
        # From here on a layer is multi-head attention over the cache that the sparse reading has left.
        cache, x = state.layers[0].clone(), torch.randn(2, 1, 32, dtype=torch.float64)
        y, _ = sparse.blocks[0].mixer(x, state=state.layers[0])
        q, k, v = sparse.blocks[0].mixer.project(x, None, 60)
        k, v = torch.cat((cache.k, k), 2), torch.cat((cache.v, v), 2)
        heads = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        torch.testing.assert_close(y, sparse.blocks[0].mixer.merge(heads))


def test_queries_are_turned_before_heads_are_averaged():
    m = ProxyAttention(32, heads=4, block=8, minimum=0, position=Rotary(8)).double()
    x = torch.randn(1, 64, 32, dtype=torch.float64)
    q, k, v = m.project(x)
    seen = m.route.select(q, k).matrix(64, 64, batch=1, heads=4)
    torch.testing.assert_close(m(x), m.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=seen)))


def test_in_half_precision_choices_are_made_in_single():
    q, k, _ = (t.bfloat16() for t in heads())
    route = ProxyHeads(0.8, block=8, minimum=0)
    assert route.scores(q, k).dtype == torch.float32
    assert torch.equal(route.select(q, k).left.table, route.select(q.float(), k.float()).left.table)


@pytest.mark.parametrize(("keywords", "words"), [
    ({"gamma": 0}, r"gamma must lie in \(0, 1\], got 0"),
    ({"gamma": 1.1}, r"gamma must lie in \(0, 1\], got 1.1"),
    ({"block": 0}, "block must be at least 1, got 0"),
    ({"block": 10}, "stride must divide block = 10, got 4"),
    ({"stride": (4, 3)}, r"stride must divide block = 128, got \(4, 3\)"),
    ({"minimum": -1}, "minimum must be at least 0, got -1"),
    ({"minimum": 0, "diagonal": False}, "or a head might see nothing"),
    ({"groups": 4}, "groups must divide kv_heads = 2, got 4"),
    ({"causal": False}, "causal must be True"),
])  # fmt: skip
def test_bad_arguments_are_named(keywords, words):
    with pytest.raises(ValueError, match=words):
        ProxyAttention(32, heads=4, kv_heads=2, **keywords)


def test_what_has_no_meaning_is_refused():
    x = torch.randn(1, 9, 8)
    with pytest.raises(ValueError, match="ProxyAttention takes no context"):
        ProxyAttention(8, heads=2)(x, context=x)
    with pytest.raises(ValueError, match="position must turn queries and keys, got ALiBi"):
        ProxyAttention(8, heads=2, position=ALiBi(2))(x)
    q, k, _ = heads()
    with pytest.raises(ValueError, match="queries must be as many as keys, 50, got 49"):
        ProxyHeads().select(q[:, :, 1:], k)
    with pytest.raises(ValueError, match="groups must divide the number of key heads 4, got 3"):
        ProxyHeads(groups=3).select(q, k)
