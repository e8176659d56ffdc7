"""Training mixtures of heads: the balance loss reaches every router, and conversion keeps what was learned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnlab.models.skeletons.decoder import Decoder
from attnlab.nn.multihead import MultiHead
from attnlab.nn.softmax.gated import GatedAttention
from attnlab.nn.softmax.mixture_of_heads import MixtureOfHeads
from attnlab.recipes.moh import balanced, convert


def test_the_loss_is_the_mean_over_the_layers_that_route() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(
        MixtureOfHeads(12, heads=4, shared=1, routed=1),
        MixtureOfHeads(12, heads=4, shared=4, routed=0),
        MixtureOfHeads(12, heads=4, shared=0, routed=2),
    )
    x = torch.randn(2, 5, 12)
    with balanced(layers) as balance:
        layers(x)
    second = layers[1](layers[0](x))
    wanted = (layers[0].router.balance(x) + layers[2].router.balance(second)) / 2
    torch.testing.assert_close(balance.loss(), wanted)
    layers(x)
    assert len(balance.losses) == 2  # nothing is collected outside
    with balanced(layers) as balance, pytest.raises(ValueError, match="no layer with routed heads ran"):
        balance.loss()


def use(balance_weight: float) -> float:
    """How often the most used of eight routed heads is picked, when one is pushed and the rest must compete."""
    torch.manual_seed(0)
    m = MixtureOfHeads(16, heads=8, shared=0, routed=1)
    with torch.no_grad():
        m.router.weight.mul_(0.1)
        m.router.weight[0, 0] = 2.0
    optimizer = torch.optim.Adam(m.parameters(), lr=1e-2)
    for _ in range(60):
        x = torch.randn(8, 8, 16)
        x[..., 0] = 1
        with balanced(m) as balance:
            loss = (m(x) - x).pow(2).mean()
            loss = loss + balance_weight * balance.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (m.router(x) > 0).float().mean((0, 1)).max().item()


def test_without_the_loss_one_head_wins_and_with_it_heads_share_the_work() -> None:
    assert use(0.0) > 0.9
    assert use(1.0) < 0.5


def test_conversion_keeps_every_weight_and_with_every_head_the_outputs() -> None:
    torch.manual_seed(0)
    model = Decoder(vocabulary=20, dim=16, depth=2, heads=4, kv_heads=2, hidden=32).double().eval()
    ids = torch.randint(20, (2, 9))
    before, weights = model(ids), model.state_dict()
    for select in ("query_norm", "learned"):
        other = Decoder(vocabulary=20, dim=16, depth=2, heads=4, kv_heads=2, hidden=32).double().eval()
        other.load_state_dict(weights)
        convert(other, shared=2, routed=2, select=select)
        assert all(type(b.mixer) is MixtureOfHeads and not b.mixer.training for b in other.blocks)
        torch.testing.assert_close(other(ids), before)
        state = other.initial_state(2)
        pieces = [other(p, state)[0] for p in ids.split([4, 5], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), before)
    convert(model, shared=2, routed=1)
    assert not torch.allclose(model(ids), before)
    assert set(weights) == set(model.state_dict())


def test_one_layer_is_converted_too_and_relatives_are_left_alone() -> None:
    assert isinstance(convert(MultiHead(8, heads=4)), MixtureOfHeads)
    with pytest.raises(ValueError, match="no MultiHead attention to convert"):
        convert(nn.Sequential(GatedAttention(8, heads=4)))
    with pytest.raises(ValueError, match="select must be 'learned' for a model that norms its queries"):
        convert(MultiHead(8, heads=4, qk_norm=nn.RMSNorm))
