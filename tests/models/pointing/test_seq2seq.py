"""The dictionaries of positions: the baselines' equations, and what they cannot do that pointers can."""

from __future__ import annotations

import pytest
import torch

from attnlab.models.pointing.answering import permutation
from attnlab.models.pointing.problems import convex_hull, random_points
from attnlab.models.pointing.ptrnet import PointerNetwork
from attnlab.models.pointing.seq2seq import PositionDictionary
from attnlab.recipes.pointing import in_order, teach


def network(**options) -> PositionDictionary:
    torch.manual_seed(0)
    net = PositionDictionary(**{"most": 7, "dim": 8, **options}).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return net


def points(batch: int = 2, n: int = 5) -> torch.Tensor:
    return random_points(batch, n, torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("attention", [True, False])
def test_probabilities_equal_the_equations_written_out(attention):
    net, sets = network(attention=attention), points()
    targets = torch.tensor([[2, 0, 5], [1, 3, 5]])
    found = net(sets, targets)
    for b in range(2):
        states, state = net.encoder(sets[b])
        inputs = torch.stack([net.start, sets[b, targets[b, 0]], sets[b, targets[b, 1]]])
        decoded, _ = net.decoder(inputs, state)
        for t, d in enumerate(decoded):
            if attention:
                look = net.attention
                u = torch.stack([look.v @ torch.tanh(look.wk.weight @ e + look.wq.weight @ d) for e in states])
                a = u.exp() / u.exp().sum()
                d = torch.cat([d, sum(w * e for w, e in zip(a, states, strict=True))])
            scores = net.words.weight @ d + net.words.bias
            # Positions 5 and 6 are none of five points; the last word is the end.
            scores = torch.cat([scores[:5], scores[7:]])
            torch.testing.assert_close(found[b, t], scores - scores.exp().sum().log(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("attention", [True, False])
def test_constrained_decoding_yields_permutations_with_their_probability(attention):
    net, sets = network(attention=attention), points(3)
    positions, log_p = net.decode(sets, beam=3, allowed=permutation)
    assert torch.equal(positions.sort(1).values, torch.arange(6).expand(3, -1))
    forced = net(sets, positions, allowed=permutation).gather(2, positions.unsqueeze(-1)).sum((1, 2))
    torch.testing.assert_close(forced, log_p)


def test_its_words_are_positions_whatever_stands_there_and_a_pointer_knows_no_such_thing():
    # Two points exchanged behind the encoder: the pointer follows them, the dictionary's words stay where they are.
    swap = [0, 3, 2, 1, 4]
    context, out = torch.randn(1, 5, 8, dtype=torch.float64), torch.randn(1, 1, 8, dtype=torch.float64)
    dictionary = network(most=5)
    torch.testing.assert_close(
        dictionary.score(out, dictionary.remember(context[:, swap]), 5),
        dictionary.score(out, dictionary.remember(context), 5),
    )
    pointer = PointerNetwork(dim=8, end=False).double()
    torch.testing.assert_close(
        pointer.score(out, pointer.remember(context[:, swap]), 5),
        pointer.score(out, pointer.remember(context), 5)[..., swap],
    )


def test_more_points_than_words_are_refused():
    with pytest.raises(ValueError, match="at most 7, as the dictionary has, got 8"):
        network()(points(1, 8), torch.tensor([[0]]))
    with pytest.raises(ValueError, match="most"):
        PositionDictionary(most=0)


@pytest.mark.parametrize("build", [PositionDictionary, PointerNetwork], ids=["dictionary", "pointer"])
@pytest.mark.parametrize(("dim", "bound"), [(256, 0.08), (16, 0.25)])
def test_weights_start_uniform_within_the_papers_bounds(build, dim, bound):
    options = {"most": 20} if build is PositionDictionary else {}
    weights = torch.cat([p.flatten() for p in build(dim=dim, **options).parameters()])
    assert weights.abs().max() <= bound and weights.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)


@pytest.mark.parametrize(
    ("build", "options"),
    [(lambda: PositionDictionary(dim=16, most=6), {}),
     (lambda: PointerNetwork(dim=16), {"rate": lambda step: 0.02, "optimizer": torch.optim.Adam})],
    ids=["dictionary", "pointer"],
)  # fmt: skip
def test_teaching_lowers_the_loss(build, options):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    history = teach(
        build(), convex_hull, lambda batch, n: in_order(random_points(batch, n, generator)), sizes=(4, 5), steps=40,
        **options,
    )  # fmt: skip
    assert len(history) == 40 and sum(history[-6:]) < 0.8 * sum(history[:6])
    with pytest.raises(ValueError, match="sizes"):
        teach(build(), convex_hull, random_points, sizes=(), steps=1)


def test_ordered_points_run_from_left_to_right():
    sets = points(4)
    ordered = in_order(sets)
    assert (ordered[:, 1:, 0] >= ordered[:, :-1, 0]).all()
    for p, q in zip(sets, ordered, strict=True):
        assert {tuple(x) for x in p.tolist()} == {tuple(x) for x in q.tolist()}
