"""CAB's methods with rotary positions: order matters, pieces equal the whole, biases are refused."""

import pytest
import torch

from attnlab.cards import build
from attnlab.positions import ALiBi, Rotary

D = torch.float64
METHODS = ("abc", "nystrom", "performer", "lara", "prob_sparse", "transformer_ls")


@pytest.mark.parametrize("name", METHODS)
def test_positions_turn_queries_and_keys(name: str) -> None:
    torch.manual_seed(0)
    m = build(name, 16, heads=2, position=Rotary(8)).double().eval()
    torch.manual_seed(0)
    plain = build(name, 16, heads=2).double().eval()
    x = torch.randn(1, 40, 16, dtype=D)
    assert (m(x) - plain(x)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="position must turn q and k"):
        build(name, 16, heads=2, position=ALiBi(2))


@pytest.mark.parametrize("name", ["abc", "performer", "transformer_ls"])
def test_pieces_stand_where_they_stand_in_the_whole(name: str) -> None:
    m = build(name, 16, heads=2, position=Rotary(8), causal=True).double().eval()
    x = torch.randn(2, 37, 16, dtype=D)
    state, found = m.initial_state(2, dtype=D), []
    for piece in x.split([5, 1, 20, 11], 1):
        y, state = m(piece, state=state)
        found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), m(x))
