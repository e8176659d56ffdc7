"""Mixture of heads: its gates by hand, what is picked, and what is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnlab.nn.mechanism import split_heads
from attnlab.nn.multihead import MultiHead
from attnlab.nn.softmax.mixture_of_heads import HeadRouter, MixtureOfHeads
from attnlab.positions import Rotary

DIM, HEADS = 24, 6


def make(**keywords) -> MixtureOfHeads:
    torch.manual_seed(0)
    return MixtureOfHeads(DIM, heads=HEADS, **keywords).double().eval()


def tokens(n: int = 7) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


def gates_by_hand(router: HeadRouter, x: Tensor) -> Tensor:
    """Of one token, in plain numbers."""
    shared, routed, split = router.weight.split(router.rows)

    def softmax(scores: list[float]) -> list[float]:
        powers = [2.718281828459045**s for s in scores]
        return [p / sum(powers) for p in powers]

    a = [s * router.shared for s in softmax((shared @ x).tolist())] if router.shared > 1 else [1.0] * router.shared
    if not router.routed:
        return torch.tensor(a, dtype=x.dtype)
    g = softmax((routed @ x).tolist())
    best = sorted(range(len(g)), key=lambda e: -g[e])[: router.routed]
    total = sum(g[e] for e in best)
    g = [g[e] / total * router.routed if e in best else 0.0 for e in range(len(g))]
    if not router.shared:
        return torch.tensor(g, dtype=x.dtype)
    w = [2 * s for s in softmax((split @ x).tolist())]
    return torch.tensor([w[0] * s for s in a] + [w[1] * s for s in g], dtype=x.dtype)


@pytest.mark.parametrize(("shared", "routed"), [(2, 2), (0, 3), (6, 0), (1, 2), (3, 3), (1, 5)])
@torch.no_grad()
def test_gates_equal_the_definition_and_weigh_each_head(shared: int, routed: int) -> None:
    m, x = make(shared=shared, routed=routed), tokens()
    gates = torch.stack([torch.stack([gates_by_hand(m.router, t) for t in b]) for b in x])
    torch.testing.assert_close(m.router(x), gates)
    plain = MultiHead(DIM, heads=HEADS).double()
    plain.load_state_dict({n: p for n, p in m.state_dict().items() if not n.startswith("router")})
    heads = plain.mix(*plain.project(x), x=x)
    torch.testing.assert_close(m(x), plain.merge(heads * gates.mT[..., None]))


def test_equal_scores_and_every_head_picked_is_plain_attention() -> None:
    for shared in (0, 1, 3, 6):
        m, x = make(shared=shared, routed=HEADS - shared), tokens()
        nn.init.zeros_(m.router.weight)
        plain = MultiHead(DIM, heads=HEADS).double()
        plain.load_state_dict({n: p for n, p in m.state_dict().items() if not n.startswith("router")})
        torch.testing.assert_close(m(x), plain(x))


def test_a_head_gets_no_gradient_from_tokens_that_did_not_pick_it() -> None:
    m, x = make(shared=2, routed=1), tokens(1)
    m(x)[0].sum().backward()
    unpicked = m.router(x)[0, 0] == 0
    assert unpicked.sum() == 3
    per_head = split_heads(m.wo.weight.grad[None], HEADS)[0].abs().sum((1, 2))
    assert torch.equal(per_head == 0, unpicked)


def test_the_balance_loss_is_the_number_of_routed_heads_when_all_are_used_alike_and_more_when_not() -> None:
    router = HeadRouter(4, 6, 2, 2).double()
    with torch.no_grad():
        router.weight.zero_()
        router.weight[2:6] = 1e-6 * torch.eye(4)
    alike = torch.eye(4, dtype=torch.float64) + torch.eye(4, dtype=torch.float64).roll(1, 0)  # each head twice
    assert router.balance(alike).item() == pytest.approx(2.0, rel=1e-5)
    with torch.no_grad():
        router.weight[2:6] = 10 * torch.eye(4)
    assert router.balance(alike[:1]).item() > 3.9  # the same two heads always: E/r times as much
    assert HeadRouter(4, 2, 2, 0).balance(torch.ones(3, 4)).item() == 0


def test_by_the_length_of_queries_a_token_takes_the_longest() -> None:
    m, x = make(shared=3, routed=1, select="query_norm", causal=True, position=Rotary(4)), tokens()
    length = m.qkv(x)[0][:, 3:].norm(dim=-1)
    wanted = torch.cat((torch.ones(2, 3, 7), nn.functional.one_hot(length.argmax(1), 3).mT), 1)
    assert torch.equal(m.gates(x, m.project(x)[0])[..., 0], wanted.double())
    assert m.router is None


def test_straight_through_changes_gradients_and_no_output() -> None:
    x, found = tokens(), []
    for through in (False, True):
        m = make(select="query_norm", straight_through=through)
        y = m(x)
        y.pow(2).sum().backward()
        found.append((y.detach(), m.wqkv.weight.grad))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert not torch.allclose(found[0][1], found[1][1])


def test_router_costs_a_row_per_head_and_two() -> None:
    plain = sum(p.numel() for p in MultiHead(DIM, heads=HEADS).parameters())
    for shared, routed, rows in ((2, 2, 8), (0, 3, 6), (6, 0, 6), (1, 2, 7)):
        assert sum(p.numel() for p in make(shared=shared, routed=routed).parameters()) - plain == rows * DIM


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(shared=7), "shared must lie in 0 to heads = 6"),
        (dict(shared=2, routed=5), "routed must lie in 1 to heads − shared = 4"),
        (dict(shared=2, routed=0), "or be 0 where all are shared"),
        (dict(select="random"), "select must be"),
        (dict(select="query_norm", qk_norm=nn.LayerNorm), "qk_norm must be None"),
    ],
)
def test_errors_name_what_is_wrong(keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**keywords)
