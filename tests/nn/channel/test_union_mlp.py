"""Union of experts in the MLP: the formula token by token, its limits, and the released order."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlab.cost import count_flops
from attnlab.nn.channel.union_mlp import UnionMLP


def make(**keywords) -> UnionMLP:
    torch.manual_seed(0)
    m = UnionMLP(12, **{"hidden": 24, **keywords}).double()
    with torch.no_grad():
        m.b1.normal_()
        m.b2.normal_()
    return m


def expert(m: UnionMLP, e: int, x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x @ m.w1[e] + m.b1[e]) @ m.w2[e] + m.b2[e]


def test_it_is_the_formula_token_by_token():
    m, x = make(), torch.randn(3, 7, 12, dtype=torch.float64)
    y = torch.zeros_like(x)
    for b in range(3):
        for i in range(7):
            for e in m.gate.linear(x[b, i]).topk(2).indices:
                y[b, i] += expert(m, e, x[b, i])
    torch.testing.assert_close(m(x), y)


def test_a_sequence_that_chooses_sends_all_its_tokens_to_its_experts():
    m, x = make(select="sequence", length=7), torch.randn(3, 7, 12, dtype=torch.float64)
    y = [sum(expert(m, e, s) for e in m.gate.linear(s.flatten()).topk(2).indices) for s in x]
    torch.testing.assert_close(m(x), torch.stack(y))
    with pytest.raises(ValueError, match="x must have 7 tokens, the length of the gate, got 6"):
        m(x[:, :6])


@pytest.mark.parametrize("options", [{}, {"variant": "release"}, {"select": "sequence", "length": 7}])
def test_with_every_expert_chosen_it_is_one_dense_mlp(options):
    m, x = make(active=4, **options), torch.randn(2, 7, 12, dtype=torch.float64)
    inner = F.gelu(x @ m.w1.transpose(0, 1).flatten(1) + m.b1.flatten())
    torch.testing.assert_close(m(x), inner @ m.w2.flatten(0, 1) + m.b2.sum(0))


@pytest.mark.parametrize("options", [{}, {"variant": "release"}])
def test_the_order_of_the_experts_does_not_matter(options):
    m, other, order = make(**options), make(**options), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for ours, theirs in zip(other.parameters(), m.parameters(), strict=True):
            ours.copy_(theirs[order])
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(other(x), m(x))


def test_released_lists_give_outputs_to_tokens_that_did_not_choose_and_the_released_order_to_wrong_ones():
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    paper, release, wrong = make(), make(variant="release"), make(variant="release", release_order=True)
    lists, _ = release.lists(x)
    y = torch.zeros_like(x)
    chosen = release.gate.chosen(release.gate.scores(x))
    for e in range(4):
        for b in range(2):
            places = lists.places[e, b].tolist()
            assert set(chosen[b, :, e].nonzero().flatten().tolist()) <= set(places)
            y[b, places] += expert(release, e, x[b, places])
    torch.testing.assert_close(release(x), y)
    assert not torch.allclose(release(x), paper(x)) and not torch.allclose(wrong(x), release(x))
    # What each expert makes of its tokens is the same: only where it goes is not.
    taken, _ = wrong.lists(x)
    assert torch.equal(taken.taken.sort(-1).values, taken.places)
    torch.testing.assert_close(wrong(x).sum(1), release(x).sum(1))


def test_lists_of_a_share_leave_out_those_that_want_an_expert_least():
    m, x = make(variant="release", share=0.4, active=4), torch.randn(2, 9, 12, dtype=torch.float64)
    lists, _ = m.lists(x)
    route = m.gate(x).permute(2, 0, 1)
    assert lists.places.shape == (4, 2, 3)
    taken = route.gather(-1, lists.places).sort(-1, descending=True).values
    assert torch.equal(taken, route.sort(-1, descending=True).values[..., :3])


def test_it_costs_half_of_the_dense_mlp():
    m = UnionMLP(16, hidden=64, experts=2, active=1)
    with torch.no_grad():
        m.gate.linear.weight[1] = -m.gate.linear.weight[0]
        m.gate.linear.bias.zero_()
    half = torch.randn(1, 512, 16)
    ours = count_flops(m, torch.cat((half, -half), 1))
    assert ours == pytest.approx(0.5 * 4 * 1024 * 16 * 64, rel=0.05)


def test_the_gate_is_trained_only_straight_through():
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    fixed, trained = make(), make(straight_through=True)
    torch.testing.assert_close(trained(x), fixed(x))
    trained(x).square().sum().backward()
    assert not fixed.gate.linear.weight.requires_grad and trained.gate.linear.weight.grad.any()


@pytest.mark.parametrize(("keywords", "words"), [
    ({"experts": 5}, "experts must be at least 1 and divide hidden = 24, got 5"),
    ({"active": 0}, "active must be between 1 and experts = 4, got 0"),
    ({"select": "all"}, "select must be 'tokens' or 'sequence', got 'all'"),
    ({"select": "sequence"}, "length goes with select='sequence', and only with it"),
    ({"length": 7}, "length goes with select='sequence', and only with it"),
    ({"variant": "official"}, "variant must be 'paper' or 'release', got 'official'"),
    ({"share": 0.5}, r"share must lie in \(0, 1\] and goes with variant='release', got 0.5 with 'paper'"),
    ({"share": 1.5, "variant": "release"}, r"share must lie in \(0, 1\]"),
    ({"release_order": True}, "release_order=True goes with variant='release'"),
])  # fmt: skip
def test_bad_arguments_are_named(keywords, words):
    with pytest.raises(ValueError, match=words):
        make(**keywords)


def test_chosen_slices_hold_more_than_the_same_slices_for_all_at_the_same_cost():
    # Labels of pairs, drawn at random: to be remembered, which the sum of two embeddings cannot do.
    classes, letters, dim = 16, 48, 32
    labels = torch.randint(classes, (letters, letters))

    def learn(fixed: bool) -> float:
        torch.manual_seed(0)
        first, second, head = nn.Embedding(letters, dim), nn.Embedding(letters, dim), nn.Linear(dim, classes)
        mlp = UnionMLP(dim, hidden=256, experts=8, active=2)
        if fixed:  # every token takes slices 0 and 1
            nn.init.zeros_(mlp.gate.linear.weight)
            mlp.gate.linear.bias.data = -torch.arange(8.0)
        net = nn.ModuleList((first, second, mlp, head))
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=4e-3)
        for _ in range(200):
            a, b = torch.randint(letters, (2, 4, 256))
            x = first(a) + second(b)
            loss = F.cross_entropy(head(x + mlp(x)).flatten(0, 1), labels[a, b].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        x = first.weight[:, None] + second.weight
        return (head(x + mlp(x)).argmax(-1) == labels).float().mean().item()

    assert learn(fixed=False) > learn(fixed=True) + 0.2
