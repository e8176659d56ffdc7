"""Spiking self-attention: whole counts in any order, spikes out, and places without an order."""

import pytest
import torch

from attnlab.nn.spiking.activity import watched
from attnlab.nn.spiking.attention import SpikingSelfAttention
from attnlab.nn.spiking.lif import LIF, lif


def lively(dim=16, heads=2):
    torch.manual_seed(0)
    m = SpikingSelfAttention(dim, heads=heads).double().eval()
    for norm in (m.norm, m.norm_o):
        torch.nn.init.normal_(norm.bias, 1.5, 0.7)
    return m


def spikes(*shape):
    return (torch.rand(*shape, dtype=torch.float64) < 0.3).double()


def test_equals_its_equations_head_by_head_with_the_counts_of_pairs_first():
    m, x = lively(), spikes(3, 2, 7, 16)
    q, k, v = (lif(m.norm(m.wqkv(x)))[0][..., i : i + 16] for i in (0, 16, 32))
    z = torch.empty_like(q)
    for head in (slice(0, 8), slice(8, 16)):
        pairs = torch.einsum("tbic,tbjc->tbij", q[..., head], k[..., head])
        assert torch.equal(pairs, pairs.round()) and pairs.max() > 0
        z[..., head] = torch.einsum("tbij,tbjc->tbic", pairs, v[..., head]) * 0.125
    assert (z >= 0).all() and torch.equal(8 * z, (8 * z).round())
    wanted = lif(m.norm_o(m.wo(lif(z, threshold=0.5)[0])))[0]
    assert torch.equal(m(x), wanted) and set(wanted.unique().tolist()) == {0.0, 1.0}


def test_one_step_may_come_without_its_axis():
    m, x = lively(), spikes(2, 7, 16)
    assert torch.equal(m(x), m(x.unsqueeze(0)).squeeze(0))


def test_silence_in_is_silence_out_without_biases():
    m = SpikingSelfAttention(16, heads=2).eval()
    torch.nn.init.zeros_(m.wo.bias)
    assert not m(torch.zeros(4, 2, 5, 16)).any()


def test_places_have_no_order_but_steps_do():
    m, x = lively(), spikes(4, 2, 9, 16)
    order = torch.randperm(9)
    assert torch.equal(m(x[:, :, order]), m(x)[:, :, order])
    assert not torch.equal(m(x.flip(0)).flip(0), m(x))


def test_watching_counts_rates_and_the_work_that_spikes_make():
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), LIF())
    torch.nn.init.constant_(net[0].weight, 1.0)
    torch.nn.init.zeros_(net[0].bias)
    x = torch.zeros(5, 4)
    x[0] = 2.0  # a drive of 8, for one step in five
    with watched(net) as activity:
        net(x)
    assert activity.rates == {"1": pytest.approx(0.2)} and activity.rate == pytest.approx(0.2)
    assert (activity.dense, activity.synaptic) == (120.0, pytest.approx(24.0))
    with watched(torch.nn.Linear(2, 2)) as quiet, pytest.raises(ValueError, match="no neurons fired"):
        quiet.rate  # noqa: B018


def test_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match="causal must be False"):
        SpikingSelfAttention(16, causal=True)
    with pytest.raises(ValueError, match="heads must divide"):
        SpikingSelfAttention(16, heads=3)
    with pytest.raises(ValueError, match="takes no context"):
        lively()(spikes(1, 2, 16), context=spikes(1, 2, 16))
