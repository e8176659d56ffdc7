"""Pointer networks: the answer's probability, decoding under constraints, any number of points."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from attnlab.models.pointing.problems import convex_hull, random_points
from attnlab.models.pointing.ptrnet import PointerNetwork, permutation, unused
from attnlab.nn.cross.pointer import Pointer


def network(**options) -> PointerNetwork:
    torch.manual_seed(0)
    net = PointerNetwork(**{"dim": 8, **options}).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return net


def points(batch: int = 2, n: int = 4) -> torch.Tensor:
    return random_points(batch, n, torch.Generator().manual_seed(1)).double()


def lstm(cell: torch.nn.LSTM, x: list[torch.Tensor], h: torch.Tensor, c: torch.Tensor):
    """Gate by gate, as the equations of the LSTM stand in the textbooks."""
    out = []
    for given in x:
        gates = cell.weight_ih_l0 @ given + cell.bias_ih_l0 + cell.weight_hh_l0 @ h + cell.bias_hh_l0
        i, f, g, o = gates.chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        out.append(h)
    return out, h, c


def test_probabilities_equal_the_equations_written_out():
    net, sets = network(), points()
    targets = torch.tensor([[2, 0, 4], [1, 3, 4]])
    found = net(sets, targets)
    for b in range(2):
        zero = torch.zeros(8, dtype=torch.float64)
        encoded, h, c = lstm(net.encoder, list(sets[b]), zero, zero)
        decoded, _, _ = lstm(net.decoder, [net.start, sets[b, targets[b, 0]], sets[b, targets[b, 1]]], h, c)
        for t, d in enumerate(decoded):
            scores = [
                sum(net.pointer.v * torch.tanh(net.pointer.wk.weight @ e + net.pointer.wq.weight @ d))
                for e in [*encoded, net.end]
            ]
            log_p = torch.stack(scores) - torch.stack(scores).exp().sum().log()
            torch.testing.assert_close(found[b, t], log_p, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"embedding": 3, "bias": True, "blend": True, "layers": 2, "bidirectional": True}]
)
def test_probabilities_sum_to_one_at_any_number_of_points(options):
    net = network(**options)
    for n in (1, 5, 33):
        log_p = net(points(3, n), torch.zeros(3, 4, dtype=torch.long))
        assert log_p.shape == (3, 4, n + 1)
        torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(3, 4, dtype=torch.float64))


def test_permuting_the_context_permutes_the_pointer():
    pointer, order = Pointer(8).double(), torch.randperm(5)
    query, context = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(pointer(query, context[:, order]), pointer(query, context)[..., order])


def test_what_is_fed_back_is_the_chosen_point():
    net, sets = network(), points(1)
    targets = torch.tensor([[1, 2, 4]])
    moved = sets.clone()
    # Position 1 and 3 exchanged: the same point under another position is the same input to the decoder.
    moved[:, [1, 3]] = moved[:, [3, 1]]
    inputs, _, _ = net.encode(moved)
    assert torch.equal(net._given(inputs, torch.tensor([[3]]))[0, 0], sets[0, 1])
    assert not torch.equal(net(sets, targets)[:, 1], net(sets, torch.tensor([[3, 2, 4]]))[:, 1])
    assert torch.equal(net(sets, targets)[:, 0], net(sets, torch.tensor([[3, 2, 4]]))[:, 0])


@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize("beam", [1, 3])
def test_constrained_decoding_yields_permutations_with_their_probability(blend, beam):
    net, sets = network(blend=blend), points(3, 5)
    positions, log_p = net.decode(sets, beam=beam, allowed=permutation)
    assert positions.shape == (3, 6)
    assert torch.equal(positions.sort(1).values, torch.arange(6).expand(3, -1)) and (positions[:, -1] == 5).all()
    forced = net(sets, positions, allowed=permutation).gather(2, positions.unsqueeze(-1)).sum((1, 2))
    torch.testing.assert_close(forced, log_p)


def test_a_wide_beam_finds_the_likeliest_of_all_tours():
    net, sets = network(), points(2, 4)
    positions, log_p = net.decode(sets, beam=200, allowed=permutation)
    for b in range(2):
        tours = torch.tensor([[*t, 4] for t in itertools.permutations(range(4))])
        every = net(sets[b : b + 1].expand(24, -1, -1), tours, allowed=permutation)
        total = every.gather(2, tours.unsqueeze(-1)).sum((1, 2))
        assert torch.equal(tours[total.argmax()], positions[b])
        torch.testing.assert_close(total.max(), log_p[b])
    assert (log_p >= net.decode(sets, allowed=permutation).log_probability).all()


def test_nothing_follows_the_end_and_no_point_comes_twice():
    positions, _ = network().decode(points(20, 5), beam=2, allowed=unused)
    for answer in positions.tolist():
        cut = answer.index(5)
        assert len(set(answer[:cut])) == cut and set(answer[cut + 1 :]) <= {-1}


def test_targets_behind_the_end_do_not_count():
    net, sets = network(), points()
    short = torch.tensor([[2, 0, 4], [1, 3, 4]])
    padded = torch.cat((short, torch.full((2, 3), -1)), 1)
    torch.testing.assert_close(net.loss(sets, padded), net.loss(sets, short))


def test_training_reaches_every_parameter_and_lowers_the_loss():
    net, sets = network(dim=16), random_points(64, 5, torch.Generator().manual_seed(0)).double()
    targets, history = convex_hull(sets), []
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = net.loss(sets, targets)
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert history[-1] < 0.75 * history[0]


@pytest.mark.parametrize("dim", [256, 512])
def test_parameters_are_two_lstms_the_pointer_and_two_vectors(dim):
    with torch.device("meta"):
        net = PointerNetwork(dim=dim)
    lstms = 2 * (4 * dim * (2 + dim) + 8 * dim)
    assert sum(p.numel() for p in net.parameters()) == lstms + 2 * dim**2 + dim + dim + 2


def test_the_forced_pass_exports():
    net, sets = network(), points()
    targets = torch.tensor([[2, 0, 4], [1, 3, 4]])
    exported = torch.export.export(net, (sets, targets)).module()
    torch.testing.assert_close(exported(sets, targets), net(sets, targets))


def test_bad_input_is_named():
    net = network()
    with pytest.raises(ValueError, match=r"points must be \(B, N, 2\)"):
        net(torch.zeros(2, 4, 3).double(), torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"targets must be in \[-1, 4\]"):
        net(points(), torch.full((2, 1), 5))
    with pytest.raises(ValueError, match="targets must be integers"):
        net(points(), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="beam"):
        net.decode(points(), beam=0)
    with pytest.raises(ValueError, match="even"):
        PointerNetwork(dim=7, bidirectional=True)
    with pytest.raises(ValueError, match="x must have shape"):
        Pointer(8)(torch.zeros(2, 3, 7), torch.zeros(2, 3, 8))
    assert math.isfinite(net.loss(points(), torch.tensor([[0, 4], [1, 4]])).item())
