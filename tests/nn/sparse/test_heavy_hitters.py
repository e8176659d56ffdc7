"""H2O's cache: its rule token by token, its size, its limits, and what it keeps that a window loses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab.cost import count_flops
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.heavy_hitters import HeavyHitters
from attnlab.patterns import Causal, Window
from attnlab.positions import ALiBi, Rotary

DIM = 16


def make(**keywords) -> HeavyHitters:
    torch.manual_seed(0)
    options = {"heads": 4, "kv_heads": 2, "heavy": 3, "recent": 2, "position": Rotary(4), **keywords}
    return HeavyHitters(DIM, **options).double().eval()


def plain(m: HeavyHitters) -> MultiHead:
    other = MultiHead(DIM, heads=4, kv_heads=2, causal=True, position=m.position).double().eval()
    other.load_state_dict(m.state_dict())
    return other


def tokens(n: int = 20) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


def token_by_token(m: HeavyHitters, x: Tensor) -> tuple[Tensor, list[list[set[int]]]]:
    """The rule with sets and sums; and what is kept after each token, for each sample and key head."""
    q, k, v = m.project(x)
    out, log = torch.zeros_like(q), []
    for b in range(len(x)):
        for g in range(m.kv_heads):
            heads = range(g * 2, g * 2 + 2)
            kept, received, after = [], torch.zeros(x.shape[1], dtype=torch.float64), []
            for i in range(x.shape[1]):
                kept.append(i)
                for h in heads:
                    weights = (k[b, g, kept] @ q[b, h, i] / 4**0.5).softmax(0)
                    out[b, h, i] = weights @ v[b, g, kept]
                    received[kept] += weights
                if i + 1 >= m.prompt:
                    while len(kept) > m.heavy + m.recent:
                        kept.remove(min((j for j in kept if j <= i - m.recent), key=lambda j: received[j].item()))
                after.append(set(kept))
            log.append(after)
    return m.merge(out), log


@pytest.mark.parametrize("options", [{}, {"heavy": 0}, {"recent": 1}, {"prompt": 9}, {"prompt": 3}, {"prompt": 20}])
def test_it_is_the_rule_token_by_token(options) -> None:
    m, x = make(**options), tokens()
    wanted, log = token_by_token(m, x)
    torch.testing.assert_close(m(x), wanted)
    state = m.initial_state(2)
    with torch.no_grad():
        for i, token in enumerate(x.split(1, 1)):
            _, state = m(token, state=state)
            kept = [set(places.tolist()) for places in state.positions.flatten(0, 1)]
            assert kept == [after[i] for after in log]


@pytest.mark.parametrize("pieces", [[1] * 300, [3, 140, 1, 7, 149], [300]], ids=["single", "mixed", "whole"])
@pytest.mark.parametrize("options", [{}, {"prompt": 150}, {"heavy": 100, "recent": 60}])
def test_pieces_give_what_the_whole_gives(options, pieces: list[int]) -> None:
    m, x = make(**options), tokens(300)
    state, out = m.initial_state(2), []
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            y, state = m(piece, state=state)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), m(x), rtol=1e-9, atol=1e-9)


def test_with_a_budget_for_the_whole_text_it_is_full_attention() -> None:
    x = tokens()
    for options in (dict(heavy=10, recent=10), dict(prompt=20)):
        m = make(**options)
        torch.testing.assert_close(m(x), plain(m)(x))


def test_without_heavy_hitters_it_is_a_window() -> None:
    m, x = make(heavy=0, recent=5), tokens()
    torch.testing.assert_close(m(x), plain(m)(x, pattern=Window(6)))  # five kept and the token itself


def test_it_keeps_exactly_its_budget_and_works_the_same_at_any_length() -> None:
    m, counts = make(), []
    state = m.initial_state(2)
    with torch.no_grad():
        for n in (3, 30, 200):
            _, state = m(tokens(n), state=state)
            counts.append(count_flops(m, tokens(1), state=state))
            assert state.k.shape[2] == state.positions.shape[2] == min(state.length, 5)
            assert bool((state.positions.sort(2).values[..., -2:] >= state.length - 2).all())
    assert counts[1] == counts[2] and state.bytes_per_token() == 0


def test_a_copied_state_goes_its_own_way() -> None:
    m, x = make(), tokens(12)
    with torch.no_grad():
        _, state = m(x[:, :8], state=m.initial_state(2))
        other = state.clone()
        m(tokens(4), state=other)
        torch.testing.assert_close(m(x[:, 8:], state=state)[0], m(x)[:, 8:])


def test_gradients_pass_through_what_is_kept() -> None:
    m = make(heavy=2, recent=1)
    assert torch.autograd.gradcheck(lambda x: m(x), tokens(7)[:1].requires_grad_())


def test_what_was_attended_to_outlives_a_window_of_the_same_size() -> None:
    # Every query asks for the marked token, which the window loses after ten tokens.
    m = HeavyHitters(4, heads=1, heavy=5, recent=5, bias=True)
    window = HeavyHitters(4, heads=1, heavy=0, recent=10, bias=True)
    with torch.no_grad():
        for p in m.parameters():
            p.zero_()
        m.wqkv.bias[0] = 10.0  # all queries are alike
        m.wqkv.weight[4, 0] = m.wqkv.weight[8, 0] = 1.0  # key and value of the mark
        m.wo.weight.copy_(torch.eye(4))
    window.load_state_dict(m.state_dict())
    x = torch.zeros(1, 200, 4)
    x[:, 0, 0] = 1.0
    assert m(x)[0, -1, 0] > 0.9 > 0.1 > window(x)[0, -1, 0]


@pytest.mark.parametrize(("wrong", "message"), [
    (lambda: make(heavy=-1), "heavy must be at least 0, got -1"),
    (lambda: make(recent=0), "recent must be at least 1, got 0"),
    (lambda: make(prompt=-1), "prompt must be at least 0, got -1"),
    (lambda: make(dropout=0.1), "dropout must be 0"),
    (lambda: make(causal=False), "causal must be True"),
    (lambda: make()(tokens(), pattern=Causal()), "takes no pattern"),
    (lambda: make()(tokens(), tokens()), "takes no context"),
    (lambda: make(position=ALiBi(4))(tokens()), "position must turn queries and keys, got ALiBi"),
    (lambda: make()(tokens(), state=make(heavy=4).initial_state(2)), "state belongs to another model"),
])  # fmt: skip
def test_errors_name_what_is_wrong(wrong, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
