"""Dynamic-mask attention: the formula row by row, its limits, what it keeps, and what it can learn to keep."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.dynamic_mask import DynamicMask, positive_mask, smooth, top_mask
from attnlab.patterns import Causal, Window
from attnlab.positions import ALiBi, Rotary


def mechanism(**keywords) -> DynamicMask:
    m = DynamicMask(16, **{"heads": 4, "kv_heads": 2, "position": Rotary(4), **keywords}).double()
    with torch.no_grad():
        m.rate.normal_()
    return m


def row_by_row(m: DynamicMask, x: torch.Tensor) -> torch.Tensor:
    """Every row for itself: the largest biases so far, and a softmax over their keys."""
    q, k, v = m.project(x)
    batch, heads, n, dim = q.shape
    out = torch.zeros_like(q)
    for b in range(batch):
        delta = m.rate * F.softplus(v[b].transpose(0, 1).flatten(1) @ m.wdt.weight.T)  # (N, Hkv)
        delta = delta.exp() if m.exponential else delta
        for h in range(heads):
            g = h * m.kv_heads // heads
            for i in range(n):
                kept = delta[: i + 1, g].argsort(descending=True)[: m.keep]
                scores = k[b, g, kept] @ q[b, h, i] / dim**0.5 + delta[kept, g]
                out[b, h, i] = scores.softmax(0) @ v[b, g, kept]
    return m.merge(out)


@pytest.mark.parametrize("options", [{}, {"exponential": False}, {"variant": "release"}, {"keep": 90}, {"keep": 1}])
def test_it_is_the_formula_row_by_row(options):
    m = mechanism(**{"keep": 5, **options})
    x = torch.randn(2, 140, 16, dtype=torch.float64)  # three runs of queries where few are kept
    torch.testing.assert_close(m(x), row_by_row(m, x))


@pytest.mark.parametrize(("keep", "pattern"), [(150, Causal()), (7, Window(7))])
def test_while_all_keys_are_alike_it_is_a_window_of_the_kept_or_causal_attention(keep, pattern):
    m = DynamicMask(16, heads=2, keep=keep).double()
    plain = MultiHead(16, heads=2, causal=True, qk_norm=lambda d: nn.RMSNorm(d, eps=1e-6)).double()
    plain.load_state_dict({n: p for n, p in m.state_dict().items() if n not in ("rate", "wdt.weight")})
    x = torch.randn(2, 150, 16, dtype=torch.float64)
    torch.testing.assert_close(m(x), plain(x, pattern=pattern))


def test_a_row_keeps_no_more_than_asked_and_heads_of_a_group_keep_the_same():
    m = mechanism(keep=6)
    kept = m.weights(torch.randn(2, 100, 16, dtype=torch.float64)) > 0
    assert torch.equal(kept.sum(-1), torch.arange(1, 101).clamp(max=6).expand(2, 4, -1))
    assert torch.equal(kept[:, 0], kept[:, 1]) and torch.equal(kept[:, 2], kept[:, 3])
    assert not torch.equal(kept[:, 0], kept[:, 2])
    # Once out, never in again.
    assert not (~kept[:, :, :-1] & kept[:, :, 1:]).tril(-1)[..., :99].any()


def test_values_and_not_keys_choose_and_the_choice_of_kept_keys_is_trained():
    m, x = mechanism(keep=5), torch.randn(1, 40, 16, dtype=torch.float64)
    before = m.weights(x) > 0
    with torch.no_grad():
        m.wqkv.weight[:24] = torch.randn(24, 16)  # queries and keys
    assert torch.equal(m.weights(x) > 0, before)
    m(x).square().sum().backward()
    assert m.rate.grad.abs().min() > 0 and m.wdt.weight.grad.abs().amax(1).min() > 0


def test_the_state_stops_growing_at_what_is_kept():
    m = mechanism(keep=6)
    state, x = m.initial_state(2, dtype=torch.float64), torch.randn(2, 50, 16, dtype=torch.float64)
    with torch.no_grad():
        for piece in x.split([3, 1, 40, 6], 1):
            _, state = m(piece, state=state)
    assert state.k.shape == state.v.shape == (2, 2, 6, 4) and state.bias.shape == (2, 2, 6) and state.length == 50


def test_it_learns_to_keep_what_will_be_asked_for_where_a_window_of_the_same_size_cannot():
    # One marked token holds one of four values; the last token asks for it. Eight keys are kept of 48.
    def texts(count):
        x, answer = 0.3 * torch.randn(count, 48, 16), torch.randint(0, 4, (count,))
        sample, place = torch.arange(count), torch.randint(0, 46, (count,))
        x[sample, place, 8] = 2.0
        x[sample, place, answer] = 2.0
        x[:, -1, 9] = 2.0
        return x, answer

    def accuracy(mixer, pattern=None):
        head = nn.Linear(16, 4)
        optimizer = torch.optim.Adam([*mixer.parameters(), *head.parameters()], 2e-2)
        for _ in range(150):
            x, answer = texts(32)
            loss = F.cross_entropy(head(mixer(x, pattern=pattern)[:, -1]), answer)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        x, answer = texts(400)
        with torch.no_grad():
            return (head(mixer(x, pattern=pattern)[:, -1]).argmax(-1) == answer).float().mean().item()

    torch.manual_seed(0)
    assert accuracy(DynamicMask(16, heads=1, keep=8)) > 0.9
    assert accuracy(MultiHead(16, heads=1, causal=True), Window(8)) < 0.55


def test_masks_of_blocks_are_kept_by_majority():
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 0]).bool()
    assert smooth(mask, 3).tolist() == [True] * 3 + [False] * 3 + [False] * 2  # half of the last is no majority
    bias = torch.tensor([[3.0, -1.0, 2.0, 1.0]])
    seen = torch.tensor([[False, True, True, True]])
    assert top_mask(bias, seen, 2).tolist() == [[False, False, True, True]]
    assert top_mask(bias, ~seen, 2).tolist() == [[True, False, False, False]]  # never one that may not be seen
    assert positive_mask(bias, seen).tolist() == [[False, False, True, True]]
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        smooth(mask, 0)


@pytest.mark.parametrize(("keywords", "words"), [
    ({"keep": 0}, "keep must be at least 1, got 0"),
    ({"variant": "exp"}, "variant must be 'paper' or 'release', got 'exp'"),
    ({"causal": False}, "causal must be True"),
])  # fmt: skip
def test_bad_arguments_are_named(keywords, words):
    with pytest.raises(ValueError, match=words):
        DynamicMask(8, heads=2, **keywords)


def test_what_has_no_meaning_is_refused():
    x = torch.randn(1, 9, 8)
    for given in (dict(context=x), dict(pattern=Causal())):
        with pytest.raises(ValueError, match="DynamicMask takes no"):
            DynamicMask(8, heads=2)(x, **given)
    with pytest.raises(ValueError, match="position must turn queries and keys, got ALiBi"):
        DynamicMask(8, heads=2, position=ALiBi(2))(x)
