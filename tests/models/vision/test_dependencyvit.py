"""DependencyViT: messages are conserved, trees are the strongest there are, and pruning keeps who speaks."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from attnlab.cost import count_flops
from attnlab.models.vision.dependency_tree import dependency_tree, subtree
from attnlab.models.vision.dependencyvit import DependencyViT, kept, prune
from attnlab.nn.softmax.reversed import ReversedAttention

TINY = {"dim": 16, "depth": 3, "heads": 2, "patch": 4, "image": 16, "num_classes": 5, "layer_scale": None}


def make(**keywords) -> ReversedAttention:
    m = ReversedAttention(8, heads=2, **keywords).double()
    nn.init.normal_(m.gate2.weight)
    return m


def by_hand(m: ReversedAttention, x: Tensor, gates: Tensor) -> Tensor:
    """One message at a time."""
    d, out = 4, torch.zeros_like(x)
    for b in range(len(x)):
        q, k, v = m.wqkv(x[b]).chunk(3, -1)
        heads = torch.zeros_like(x[b])
        for child in range(x.shape[1]):
            speak = gates[b, child] * m.gate2(nn.functional.gelu(m.gate1(x[b, child]))).sigmoid()
            through = (m.select(x[b, child]) / m.temperature).softmax(0)
            for h in range(2):
                part = slice(h * d, (h + 1) * d)
                to = (k[:, part] @ q[child, part] / d**0.5).softmax(0)
                for parent in range(x.shape[1]):
                    heads[parent, part] = heads[parent, part] + to[parent] * through[h] * speak * v[child, part]
        out[b] = m.wo(heads)
    return out


@torch.no_grad()
def test_equals_the_definition_message_by_message() -> None:
    m, x, gates = make(), torch.randn(2, 5, 8).double(), torch.rand(2, 5).double()
    torch.testing.assert_close(m.send(x, gates).y, by_hand(m, x, gates))


@torch.no_grad()
def test_each_child_sends_exactly_its_gate_and_gates_only_close() -> None:
    m, x = make(), torch.randn(2, 7, 8).double()
    first = m.send(x, dependencies=True)
    assert first.dependencies is not None
    torch.testing.assert_close(first.dependencies.sum(1), first.gates)
    second = m.send(first.y, first.gates)
    assert bool(((second.gates > 0) & (second.gates < first.gates) & (first.gates < 1)).all())
    assert second.dependencies is None


@torch.no_grad()
def test_where_all_parents_are_alike_it_is_ordinary_attention_through_one_of_the_heads() -> None:
    m, x = make(), torch.randn(1, 6, 8).double()
    for p in (m.wqkv.weight[:8], m.select.weight, m.gate2.weight):
        p.zero_()  # equal scores, equal heads, gates of a half
    ordinary = m.wqkv(x)[..., 16:].mean(1, keepdim=True).expand_as(x)
    torch.testing.assert_close(m(x), m.wo(ordinary / 2 * 0.5))


def strongest(strength: Tensor, root: int) -> float:
    """Over all choices of parents that reach the root."""
    n, best = len(strength), float("-inf")
    for parents in product(range(n), repeat=n):
        if parents[root] != root or any(p == i for i, p in enumerate(parents) if i != root):
            continue
        at = list(range(n))
        for _ in range(n):
            at = [parents[i] for i in at]
        if all(i == root for i in at):
            best = max(best, sum(strength[p, i].item() for i, p in enumerate(parents) if i != root))
    return best


def test_the_tree_is_the_strongest_of_all_trees() -> None:
    for n in (1, 2, 3, 4, 5, 5, 5, 5):
        strength = torch.rand(n, n, dtype=torch.float64)
        for root in range(n):
            parents = dependency_tree(strength, root)
            total = sum(strength[parents[i], i].item() for i in range(n) if i != root)
            assert total == pytest.approx(strongest(strength, root), abs=1e-9)
            assert bool(subtree(parents, root).all())  # it is a tree: all hang below its root


def test_nested_cycles_come_apart_and_the_root_is_who_receives_most() -> None:
    strength = torch.rand(60, 60, dtype=torch.float64) * 0.1
    for size, weight in ((2, 3.0), (6, 2.0), (20, 1.0)):  # tokens of a group prefer each other, rings within rings
        for i in range(60):
            strength[(i // size) * size + (i + size // 2) % size, i] += weight
    strength[7] += 0.5
    parents = dependency_tree(strength)
    off = strength.clone().fill_diagonal_(0)
    assert parents[off.sum(1).argmax()] == off.sum(1).argmax() == 7 and bool(subtree(parents, 7).all())
    child = next(i for i in range(60) if parents[i] == 7 and i != 7)
    below = subtree(parents, child)
    assert below[child] and not below[7]
    assert all(bool(below[parents[i]]) for i in range(60) if below[i] and i != child)


@torch.no_grad()
def test_pruning_keeps_the_published_shares_in_order() -> None:
    left, shares = 100, []
    for time in (1, 2, 3, 4):
        left = kept(left, 0.16, time)
        shares.append(left)
    assert shares == [84, 68, 52, 36]
    x, gates = torch.arange(12.0).view(1, 6, 2), torch.rand(1, 6)
    y, g, places = prune(x, gates, torch.tensor([[5.0, 1, 4, 0, 3, 2]]), 3)
    assert places.tolist() == [[0, 2, 4]]
    assert torch.equal(y, x[:, ::2]) and torch.equal(g, gates[:, ::2])


@pytest.mark.parametrize("score", ["sent", "received"])
@torch.no_grad()
def test_pruned_tokens_leave_zeros_and_cost_nothing_more(score: str) -> None:
    torch.manual_seed(0)
    lite = DependencyViT(**TINY, prune=0.25, prune_after=(1, 2), score=score).eval()
    full = DependencyViT(**TINY).eval()
    full.load_state_dict(lite.state_dict())
    x = torch.randn(2, 3, 16, 24)
    empty = (lite.forward_features(x)[0] == 0).all(1)
    assert empty.sum((1, 2)).tolist() == [12, 12]  # half of the 24
    assert not torch.allclose(lite(x), full(x))
    assert count_flops(lite, x) < count_flops(full, x)
    out = lite.encode(lite.embed(x)[0], dependencies=True)
    assert out.dependencies is not None and out.dependencies.shape == (2, 24, 24)
    # Over all layers a child sent the sum of its gates: those who stayed through three layers, the most of all.
    sent, stayed = out.dependencies.sum(1), torch.zeros(2, 24, dtype=torch.bool).scatter(1, out.places, True)
    assert bool((sent > 0).all())
    if score == "sent":
        assert sent[stayed].min() > sent[~stayed].min()


@torch.no_grad()
def test_every_image_has_a_tree_of_its_tokens() -> None:
    net = DependencyViT(**TINY, prune=0.25, prune_after=(1,)).eval()
    for parents in net.tree(torch.randn(2, 3, 16, 16)):
        roots = [i for i in range(16) if parents[i] == i]
        assert len(roots) == 1 and bool(subtree(parents, roots[0]).all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ReversedAttention(8, heads=2, causal=True), "has no causal form"),
        (lambda: ReversedAttention(8, heads=2, temperature=0.0), "temperature must be positive"),
        (lambda: make().send(torch.randn(1, 3, 8).double(), torch.ones(1, 2)), r"gates must be \(B, N\) = \(1, 3\)"),
        (lambda: DependencyViT(**TINY, prune=0.3), r"prune must be in \[0, 1 / 4\)"),
        (lambda: DependencyViT(**TINY, score="all"), "score must be 'sent' or 'received'"),
        (lambda: DependencyViT(**TINY).forward_features(torch.randn(1, 3, 16, 16), layers=(0,)), "layers must be"),
        (lambda: DependencyViT(**TINY)(torch.randn(1, 3, 15, 16)), "sides multiples of patch=4"),
        (lambda: prune(torch.zeros(1, 3, 2), torch.ones(1, 3), torch.ones(1, 3), 0), "keep must lie in 1 to"),
        (lambda: dependency_tree(torch.ones(2, 3)), r"strength must be \(N, N\)"),
        (lambda: dependency_tree(torch.full((2, 2), torch.nan)), "strength must be finite"),
        (lambda: dependency_tree(torch.ones(2, 2), root=2), "root must lie in 0 to 1, got 2"),
        (lambda: subtree(torch.zeros(2, dtype=torch.long), 5), "token must lie in 0 to 1, got 5"),
    ],
)
def test_errors_name_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
