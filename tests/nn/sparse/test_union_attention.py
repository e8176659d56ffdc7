"""Union of experts in attention: the formula token by token, its limits, and what the released lists let through."""

import pytest
import torch
import torch.nn.functional as F

from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.union_attention import UnionAttention
from attnlab.patterns import Causal
from attnlab.positions import Position, Rotary
from attnlab.routing.experts import lists_of, released_lists


def make(**keywords) -> UnionAttention:
    torch.manual_seed(0)
    m = UnionAttention(16, **{"heads": 4, **keywords}).double()
    with torch.no_grad():
        m.bqkv.normal_()
        m.bo.normal_()
    return m


def token_by_token(m: UnionAttention, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
    """Every head of every sequence by itself, with the list of those tokens that chose it."""
    old = 0 if memory is None else memory.shape[1]
    text = x if memory is None else torch.cat((memory, x), 1)
    y = torch.zeros_like(x)
    chosen = m.gate.linear(text).topk(m.gate.active, -1).indices
    for b in range(len(x)):
        for h in range(m.heads):
            mine = [i for i in range(text.shape[1]) if h in chosen[b, i]]
            if not mine:
                continue
            q, k, v = (text[b, mine] @ m.wqkv[h] + m.bqkv[h]).chunk(3, -1)
            q, k = (t[0, 0] for t in m.position(q[None, None], k[None, None]))
            scores = q @ k.T * m.head_dim**-0.5
            if m.causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            out = scores.softmax(-1) @ v @ m.wo[h] + m.bo[h]
            for i, row in zip(mine, out, strict=True):
                if i >= old:
                    y[b, i - old] += row
    return y


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"active": 1}, {"active": 3, "position": Position()}])
def test_it_is_the_formula_head_by_head(causal, options):
    m = make(causal=causal, **options)
    x = torch.randn(3, 13, 16, dtype=torch.float64)
    torch.testing.assert_close(m(x), token_by_token(m, x))


@pytest.mark.parametrize("older", [1, 6, 20])
def test_a_memory_is_what_came_before_in_each_heads_list(older):
    m = make(causal=True)
    memory, x = torch.randn(3, older, 16, dtype=torch.float64), torch.randn(3, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(m(x, memory=memory), token_by_token(m, x, memory))
    torch.testing.assert_close(m(x, memory=memory), m(torch.cat((memory, x), 1))[:, older:])


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("causal", [False, True])
def test_with_every_head_chosen_it_is_multi_head_attention(variant, causal):
    m = make(active=4, variant=variant, causal=causal)
    plain = MultiHead(16, heads=4, bias=True, causal=causal, position=Rotary(4)).double()
    with torch.no_grad():
        for i, (w, b) in enumerate(zip(m.wqkv.chunk(3, -1), m.bqkv.chunk(3, -1), strict=True)):
            plain.wqkv.weight[16 * i : 16 * (i + 1)] = w.transpose(1, 2).flatten(0, 1)
            plain.wqkv.bias[16 * i : 16 * (i + 1)] = b.flatten()
        plain.wo.weight.copy_(m.wo.flatten(0, 1).T)
        plain.wo.bias.copy_(m.bo.sum(0))
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    torch.testing.assert_close(m(x), plain(x))


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_the_order_of_the_heads_does_not_matter(variant):
    m, other, order = make(variant=variant), make(variant=variant), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for ours, theirs in zip(other.parameters(), m.parameters(), strict=True):
            ours.copy_(theirs[order])
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    torch.testing.assert_close(other(x), m(x))


def test_the_released_lists_see_ahead_and_other_samples_and_the_papers_do_not():
    x, batch = torch.randn(2, 12, 16, dtype=torch.float64), torch.randn(4, 12, 16, dtype=torch.float64)
    later = torch.cat((x[:, :6], torch.randn(2, 6, 16, dtype=torch.float64)), 1)
    paper, release = make(causal=True), make(causal=True, variant="release")
    torch.testing.assert_close(paper(later)[:, :6], paper(x)[:, :6])
    torch.testing.assert_close(paper(torch.cat((x, batch)))[:2], paper(x))
    leaks = [not torch.allclose(release(torch.cat((x[:, :6], torch.randn_like(x[:, 6:])), 1))[:, :6], release(x)[:, :6])
             for _ in range(5)]  # fmt: skip
    assert any(leaks)
    assert not torch.allclose(release(torch.cat((x, batch)))[:2], release(x))


def test_a_head_that_nobody_chose_is_silent_and_gradients_stay_finite():
    m = make(active=1)
    with torch.no_grad():
        m.gate.linear.weight.zero_()
        m.gate.linear.bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0]))
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    y = m(x)
    y.square().sum().backward()
    assert x.grad.isfinite().all() and m.wqkv.grad.isfinite().all()
    assert not m.wo.grad[[0, 1, 3]].any() and m.wo.grad[2].any()
    # One sequence's head stays empty where another's is full.
    with torch.no_grad():
        m.gate.linear.weight[3, 0] = 100.0
        x[0, :, 0], x[1, :, 0] = 1.0, -1.0
    torch.testing.assert_close(m(x), token_by_token(m, x))
    (gradient,) = torch.autograd.grad(m(x).square().sum(), x)
    assert gradient.isfinite().all()


def test_lists_hold_the_tokens_that_chose_and_released_ones_fill_up_with_others():
    chosen = torch.tensor([[1, 0], [1, 1], [0, 0], [1, 0]]).bool()[None]
    lists = lists_of(chosen)
    assert lists.places[0, 0].tolist() == [0, 1, 3] and lists.filled[0, 0].all()
    assert lists.places[1, 0, 0] == 1 and lists.filled[1, 0].tolist() == [True, False, False]
    behind = lists_of(chosen, last=True)
    assert behind.places[1, 0, 2] == 1 and behind.filled[1, 0].tolist() == [False, False, True]
    route = chosen * torch.tensor([[0.2, 0.0], [0.9, 0.4], [0.0, 0.0], [0.5, 0.0]])
    assert released_lists(route).places[0, 0].tolist() == [0, 1, 3]
    assert released_lists(route, release_order=True).taken[0, 0].tolist() == [1, 3, 0]
    filled_up = released_lists(route).places[1, 0]
    assert len(filled_up) == 3 and 1 in filled_up


def test_the_gate_is_trained_only_straight_through():
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    fixed, trained = make(), make(straight_through=True)
    torch.testing.assert_close(trained(x), fixed(x))
    trained(x).square().sum().backward()
    assert not fixed.gate.linear.weight.requires_grad and trained.gate.linear.weight.grad.any()


def test_scores_cost_a_quarter_where_heads_are_chosen_evenly():
    from attnlab.cost import count_flops

    m, plain = UnionAttention(32, heads=2, active=1), MultiHead(32, heads=2)
    with torch.no_grad():
        m.gate.linear.weight[1] = -m.gate.linear.weight[0]
        m.gate.linear.bias.zero_()
    half = torch.randn(1, 1024, 32)
    x = torch.cat((half, -half), 1)  # every second token chooses the first head
    assert (m.gate.chosen(m.gate.scores(x)).sum(1) == 1024).all()
    ours, dense = (count_flops(mechanism, x) for mechanism in (m, plain))
    projections = 2 * 2048 * 32 * 32 * 4
    assert dense - projections == pytest.approx(4 * (ours - projections / 2), rel=0.01)


@pytest.mark.parametrize(("keywords", "words"), [
    ({"variant": "official"}, "variant must be 'paper' or 'release', got 'official'"),
    ({"active": 5}, "active must be between 1 and experts = 4, got 5"),
    ({"heads": 5}, "heads must divide dim = 16, got 5"),
])  # fmt: skip
def test_bad_arguments_are_named(keywords, words):
    with pytest.raises(ValueError, match=words):
        make(**keywords)


def test_what_has_no_meaning_is_refused():
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    for given in (dict(context=x), dict(pattern=Causal())):
        with pytest.raises(ValueError, match="UnionAttention takes no"):
            make()(x, **given)
    with pytest.raises(ValueError, match=r"memory must have shape|must have shape \(B, N, 16\)"):
        make()(x, memory=F.pad(x, (0, 1)))


@pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 6], [2, 2, 2, 5]])
def test_decodes_with_each_heads_own_tokens_alone(pieces):
    m, x = make(causal=True, heads=4, active=2), torch.randn(3, 11, 16, dtype=torch.float64)
    state, out = m.initial_state(3), []
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            y, state = m(piece, state=state)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), m(x))
    assert state.numbers() == 3 * 11 * 2 * 2 * 4
    with pytest.raises(ValueError, match="causal=True and variant='paper'"):
        make(causal=True, variant="release").initial_state(1)
    with pytest.raises(ValueError, match="takes no memory"):
        m(x, memory=x, state=m.initial_state(3))
