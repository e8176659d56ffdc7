"""Linear attention: by hand with the whole matrix, in its four uses, and streamed with a state of constant size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab.nn.linear.linear_attention import LinearAttention

DIM, HEADS = 12, 3


def make(**keywords) -> LinearAttention:
    torch.manual_seed(0)
    return LinearAttention(DIM, heads=HEADS, **keywords).double().eval()


def by_hand(m: LinearAttention, x: Tensor, context: Tensor) -> Tensor:
    """Σ_j φ(q)ᵀφ(k_j) v_j / Σ_j φ(q)ᵀφ(k_j), head by head and query by query."""
    wq, wk, wv = m.wqkv.weight.chunk(3)
    q, k, v = x @ wq.T, context @ wk.T, context @ wv.T
    phi = lambda t: torch.where(t > 0, t + 1, t.exp())  # noqa: E731
    y = torch.zeros(*x.shape[:2], DIM, dtype=x.dtype)
    for h in range(HEADS):
        own = slice(h * DIM // HEADS, (h + 1) * DIM // HEADS)
        for i in range(x.shape[1]):
            seen = slice(0, i + 1) if m.causal else slice(None)
            weight = (phi(q[:, i, None, own]) * phi(k[:, seen, own])).sum(-1)
            y[:, i, own] = (weight.unsqueeze(-1) * v[:, seen, own]).sum(1) / weight.sum(1, keepdim=True)
    return y @ m.wo.weight.T


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("others", [None, 3, 7, 9])
def test_equals_the_sums_written_out(causal: bool, others: int | None):
    m, x = make(causal=causal), torch.randn(2, 7, DIM, dtype=torch.float64)
    context = None if others is None else torch.randn(2, others, DIM, dtype=torch.float64)
    wanted = by_hand(m, x, x if context is None else context)
    torch.testing.assert_close(m(x, context), wanted, rtol=0, atol=2e-6)  # 1e-6 in the denominator


@pytest.mark.parametrize("causal", [False, True])
def test_weights_are_those_that_mix_the_values(causal: bool):
    m, x = make(causal=causal), torch.randn(2, 7, DIM, dtype=torch.float64)
    torch.testing.assert_close(m.merge(m.weights(x) @ m.project(x)[2]), m(x))
    torch.testing.assert_close(m.weights(x).sum(-1), torch.ones(2, HEADS, 7).double(), rtol=0, atol=1e-5)


def test_the_state_does_not_grow():
    m = make(causal=True)
    state, sizes = m.initial_state(2, dtype=torch.float64), set()
    for n in (1, 40, 3):
        _, state = m(torch.randn(2, n, DIM, dtype=torch.float64), state=state)
        sizes.add(tuple(state.sums.shape))
    assert sizes == {(2, HEADS, 4, 5)}


def test_no_weight_is_lost_where_every_feature_is_tiny():
    m = make().float()
    with torch.no_grad():
        m.wqkv.weight.zero_().add_(-40.0)
    assert m(torch.full((1, 5, DIM), 1.0)).isfinite().all()


def test_what_it_cannot_do_is_said():
    m, x = make(), torch.randn(1, 4, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match="causal=True"):
        m.initial_state(1)
    with pytest.raises(ValueError, match="causal=True"):
        m(x, state=make(causal=True).initial_state(1))
    with pytest.raises(ValueError, match="no pattern"):
        m(x, pattern=object())
