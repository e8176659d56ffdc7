"""Superlinear attention: the masks that are meant, its limits, what the search learns, and more steps than two."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse import superlinear
from attnlab.nn.sparse.superlinear import SpanSearch, Superlinear, span_attention
from attnlab.patterns import Causal, Window
from attnlab.positions import ALiBi, Rotary

SETTINGS = [
    dict(),
    dict(window=2, topk=3, forward=1.0, backward=1.0),
    dict(window=0, topk=2),
    dict(power=3, forward=0.5, backward=2.0),
    dict(power=1 / 0.55, topk=3),
]


def heads(n=70, groups=2, dim=8):
    return [torch.randn(2, h, n, dim, dtype=torch.float64) for h in (2 * groups, 2 * groups, 2, 2)]


def one_query(q1, q2, k, v, at, *, window=1, topk=2, power=2.0, backward=2.0, forward=0.0):
    """Two steps for the query at one position, key by key: q1, q2 (D), k, v (N, D)."""
    w = math.floor((window + 1) ** power) - 1
    near = [j for j in range(at - w + 1, at + 1) if j >= 0]
    anchors, i = [], window + 1
    while at - math.floor(i**power) + 1 >= 0:
        anchors.append(at - math.floor(i**power) + 1)
        i += 1
    scored = sorted(((q1 @ k[a]).item(), a) for a in anchors)[::-1][:topk]
    root = math.sqrt(at + 1)
    outputs, scores = [], []
    for score, a in scored:
        end = min(a + math.ceil(forward * root), at - w) if forward else a
        seen = near + list(range(max(a - math.ceil(backward * root), 0), end + 1))
        assert len(set(seen)) == len(seen)
        outputs.append((k[seen] @ q2 / len(q2) ** 0.5).softmax(0) @ v[seen])
        scores.append(score)
    if not outputs:
        return (k[near] @ q2 / len(q2) ** 0.5).softmax(0) @ v[near]
    return torch.tensor(scores, dtype=torch.float64).softmax(0) @ torch.stack(outputs)


@pytest.mark.parametrize("settings", SETTINGS)
def test_it_is_what_two_steps_give_key_by_key(settings):
    q1, q2, k, v = heads()
    search = SpanSearch(**settings)
    out = span_attention(q2, k, v, search(q1, k), search)
    for at in (0, 1, 2, 3, 7, 8, 15, 24, 25, 48, 68, 69):
        for b in range(2):
            for h in range(4):
                wanted = one_query(q1[b, h, at], q2[b, h, at], k[b, h // 2], v[b, h // 2], at, **settings)
                torch.testing.assert_close(out[b, h, at], wanted)


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_pieces_of_queries_give_what_all_at_once_give_and_the_same_gradients(steps, monkeypatch):
    m = Superlinear(16, heads=4, kv_heads=2, steps=steps, position=Rotary(4)).double()
    x = torch.randn(2, 90, 16, dtype=torch.float64, requires_grad=True)

    def outcome():
        y = m(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, *m.parameters()])

    whole = outcome()
    monkeypatch.setattr(superlinear, "_HELD", 1)  # runs of 16 queries
    for a, b in zip(whole, outcome(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("settings", [dict(window=11), dict(window=200), dict(window=5, steps=3)])
def test_a_window_over_everything_is_causal_attention(settings):
    m = Superlinear(16, heads=2, **settings).double()
    plain = MultiHead(16, heads=2, causal=True).double()
    plain.load_state_dict({n: p for n, p in m.state_dict().items() if not n.startswith("wq1")})
    x = torch.randn(2, 140, 16, dtype=torch.float64)
    torch.testing.assert_close(m(x), plain(x))


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_no_key_is_out_of_reach(steps):
    # A search that scores one key alone must be able to find a span that holds it, wherever it lies.
    n, search = 300, SpanSearch(steps=steps, topk=99)
    k = torch.zeros(1, 1, n, 1, dtype=torch.float64)
    spans = search(torch.zeros(1, 1, n, 1, dtype=torch.float64), k)
    if steps == 2:  # every anchor is kept, so the union of their spans is what can be found
        j = torch.arange(n)
        held = (spans.start[..., None] <= j) & (j <= spans.end[..., None]) & (spans.anchor[..., None] >= 0)
        near = (j[None] > j[:, None] - search.window_size) & (j[None] <= j[:, None])
        assert torch.equal(held.any(-2)[0, 0] | near, torch.ones(n, n, dtype=torch.bool).tril())
        return
    # A slope down to the target from behind leads each step to the nearest site at or after it, whose span holds it.
    for target in range(n - search.window_size):
        j = torch.arange(n, dtype=torch.float64)
        k = torch.where(j < target, -1000.0, target - j).view(1, 1, n, 1)
        spans = SpanSearch(steps=steps, topk=1)(torch.ones(1, 1, n, 1, dtype=torch.float64), k)
        asked = torch.arange(target + search.window_size, n)  # those whose window holds it need no search
        start, end = (t[0, 0, asked, 0] for t in (spans.start, spans.end))
        assert ((start <= target) & (target <= end)).all(), target


def test_scores_are_not_scaled_and_sharpen_the_gate_alone():
    q1, _, k, _ = heads()
    search = SpanSearch(topk=3)
    once, twice = search(q1, k), search(2 * q1, k)
    assert torch.equal(once.anchor, twice.anchor)
    torch.testing.assert_close(twice.scores[once.anchor >= 0], 2 * once.scores[once.anchor >= 0])
    direct = torch.einsum("bhgnd,bhnd->bhgn", q1.unflatten(1, (2, 2))[..., 69:, :], k[:, :, once.anchor[0, 0, 69, :1]])
    torch.testing.assert_close(direct[0, 0, 0, 0], once.scores[0, 0, 69, 0])


def test_powers_of_whole_numbers_are_exact():
    # In float32, and with logarithms in float64, some cubes come out one less.
    search, n = SpanSearch(power=3, window=1), 10**9 + 1
    anchors = search.anchors(torch.tensor([n - 1]), n - 1)[0]
    assert anchors.tolist() == [n - i**3 for i in range(2, 1001)]


def test_more_steps_look_at_fewer_keys():
    looked = []
    for steps in (2, 3, 4):
        search = SpanSearch(steps=steps)
        anchors = search.anchors(torch.tensor([10**6 - 1]), 10**6 - 1)
        assert anchors.shape[1] <= steps * 10 ** (6 / steps)
        looked.append(search.width(10**6 - 1))
    assert looked == [2002, 302, 129]


def test_the_search_is_trained_through_the_gate():
    q1, q2, k, v = (t.requires_grad_() for t in heads())
    search = SpanSearch(topk=1)
    out = span_attention(q2, k, v, search(q1, k), search)
    assert not torch.autograd.grad(out.square().sum(), q1)[0].any()  # one span: its gate is 1 whatever its score
    search = SpanSearch(topk=2)
    out = span_attention(q2, k, v, search(q1, k), search)
    assert torch.autograd.grad(out.square().sum(), q1)[0][:, :, 40:].abs().amax(-1).min() > 0


def test_a_trained_search_finds_a_needle_that_a_window_cannot_see():
    # A stretch of marked tokens holds one of four values, far before the last token, which asks for it.
    def texts(count):
        x, answer = 0.3 * torch.randn(count, 64, 16), torch.randint(0, 4, (count,))
        first = torch.randint(0, 40, (count, 1)) + torch.arange(16)
        sample = torch.arange(count)[:, None]
        x[sample, first, 8] = 2.0
        x[sample, first, answer[:, None]] = 2.0
        x[:, -1, 9] = 2.0
        return x, answer

    def accuracy(mixer):
        head = nn.Linear(16, 4)
        optimizer = torch.optim.Adam([*mixer.parameters(), *head.parameters()], 2e-2)
        for _ in range(40):
            x, answer = texts(16)
            loss = F.cross_entropy(head(mixer(x)[:, -1]), answer)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        x, answer = texts(200)
        with torch.no_grad():
            return (head(mixer(x)[:, -1]).argmax(-1) == answer).float().mean().item()

    class Near(MultiHead):
        def where(self, given, offset, queries):
            return Window(3)

    torch.manual_seed(0)
    assert accuracy(Superlinear(16, heads=1)) > 0.9
    assert accuracy(Near(16, heads=1)) < 0.4


@pytest.mark.parametrize(("keywords", "words"), [
    ({"steps": 1}, "steps must be an integer of at least 2, got 1"),
    ({"topk": 0}, "topk must be an integer of at least 1"),
    ({"window": 1.5}, "window must be an integer"),
    ({"power": 0.5}, "power must be at least 1"),
    ({"backward": -1.0}, "backward must be 0 or more"),
    ({"forward": -1.0}, "forward must be 0 or more"),
    ({"span_power": 2.0}, "span_power must be between 0 and 1"),
    ({"causal": False}, "causal must be True"),
    ({"dropout": 0.1}, "dropout must be 0"),
])  # fmt: skip
def test_bad_arguments_are_named(keywords, words):
    with pytest.raises(ValueError, match=words):
        Superlinear(8, heads=2, **keywords)


def test_what_has_no_meaning_is_refused():
    x = torch.randn(1, 9, 8)
    for given in (dict(context=x), dict(pattern=Causal())):
        with pytest.raises(ValueError, match="Superlinear takes no"):
            Superlinear(8, heads=2)(x, **given)
    with pytest.raises(ValueError, match="position must turn queries and keys, got ALiBi"):
        Superlinear(8, heads=2, position=ALiBi(2))(x)
