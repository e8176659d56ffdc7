"""Sigmoid attention: the definition by hand, and what sets it apart from softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from attnlab.nn.softmax.sigmoid import SigmoidAttention
from attnlab.patterns import Explicit, Window
from attnlab.positions import ALiBi, Rotary, alibi_slopes

DIM = 24


def make(**keywords) -> SigmoidAttention:
    torch.manual_seed(0)
    return SigmoidAttention(DIM, **{"heads": 4, "kv_heads": 2, **keywords}).double().eval()


def tokens(n: int = 7) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("qk_norm", [None, nn.LayerNorm])
@pytest.mark.parametrize("v_norm", [None, nn.LayerNorm])
def test_equals_the_definition(causal: bool, alibi: bool, qk_norm, v_norm) -> None:
    t, b = 0.3, -1.7
    m = make(
        shift=b, temperature=t, causal=causal, position=ALiBi(4) if alibi else None, qk_norm=qk_norm, v_norm=v_norm
    )
    x, d, n = tokens(), 6, 7
    q, k, v = (x @ w.T for w in m.wqkv.weight.split([4 * d, 2 * d, 2 * d]))
    out = []
    for h in range(4):
        mine, theirs = slice(h * d, (h + 1) * d), slice(h // 2 * d, (h // 2 + 1) * d)
        qh, kh, vh = m.q_norm(q[..., mine]), m.k_norm(k[..., theirs]), m.v_norm(v[..., theirs])
        scores = qh @ kh.mT / math.sqrt(d)
        if alibi:
            distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()
            scores = scores - float(alibi_slopes(4).float()[h]) * distance
        # The authors' order: position, mask, temperature, then the shift.
        if causal:
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
        out.append(torch.sigmoid(scores * math.exp(t) + b) @ vh)
    torch.testing.assert_close(m(x), torch.cat(out, -1) @ m.wo.weight.T)


@pytest.mark.parametrize("n", [4, 64])
def test_rows_of_zero_scores_sum_to_nearly_one(n: int) -> None:
    m = make()
    nn.init.zeros_(m.wqkv.weight)
    torch.testing.assert_close(m.weights(tokens(n)).sum(-1), torch.full((2, 4, n), n / (n + 1), dtype=torch.float64))


def test_changing_one_key_changes_one_column() -> None:
    m, x, context = make(), tokens(3), tokens(8)
    other = context.clone()
    other[:, 5] = torch.randn(DIM, dtype=torch.float64)
    changed = (m.weights(x, context) != m.weights(x, other)).any(dim=(0, 1, 2))
    assert changed.tolist() == [j == 5 for j in range(8)]


def test_masked_pairs_weigh_nothing_whatever_the_shift() -> None:
    m, x, mask = make(shift=50.0), tokens(), torch.rand(7, 7) < 0.5
    weights = m.weights(x, pattern=Explicit(mask))
    assert not weights[..., ~mask].any()
    assert (weights[..., mask] > 0.99).all()


def test_the_shift_is_the_length_of_training_not_of_the_call() -> None:
    x = tokens()
    torch.testing.assert_close(make(length=100)(x), make(shift=-math.log(100))(x))
    torch.testing.assert_close(make()(x), make(length=7)(x))
    with torch.no_grad():
        assert not torch.allclose(make(length=100)(x), make()(x))


def test_the_checkpoint_carries_temperature_and_shift() -> None:
    m, other = make(length=100, temperature=0.2), make()
    other.load_state_dict(m.state_dict())
    x = tokens()
    assert torch.equal(other(x), m(x))
    other.load_state_dict(make().state_dict())
    assert other.shift is None


@pytest.mark.parametrize("rows", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("position", [None, Rotary(6), ALiBi(4)], ids=["none", "rotary", "alibi"])
def test_pieces_give_what_the_whole_gives(position, rows: float) -> None:
    m, x = make(length=32, causal=True, position=position, temperature=0.1, rows=rows), tokens(12)
    state, out = m.initial_state(2), []
    with torch.no_grad():
        for piece in x.split([5, 1, 1, 5], 1):
            y, state = m(piece, state=state)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), m(x))


def test_row_scaling_divides_the_output_of_each_query_by_a_power_of_its_place() -> None:
    x = tokens()
    scaled, plain = make(shift=0.0, rows=0.5), make(shift=0.0)
    place = torch.arange(1, 8, dtype=torch.float64)[:, None]
    torch.testing.assert_close(scaled(x), plain(x) / place.sqrt())


def test_the_hybrid_norm_comes_last() -> None:
    m, x = make(out_norm=nn.RMSNorm), tokens()
    torch.testing.assert_close(m(x), m.out_norm(make()(x)))


def test_a_window_narrows_it() -> None:
    m, x = make(length=7, causal=True), tokens()
    near = (torch.arange(7)[:, None] - torch.arange(7)).clamp_min(0) < 3
    torch.testing.assert_close(m(x, pattern=Window(3)), m(x, pattern=Explicit(near)))


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="length must be at least 1"):
        make(length=0)
    with pytest.raises(ValueError, match="excludes shift"):
        make(length=5, shift=0.0)
    with pytest.raises(ValueError, match="streaming needs length"):
        make(causal=True).initial_state(2)


def test_attention_without_the_shift_is_much_larger_at_the_start() -> None:
    """The authors' reason for −log n: without it the weights of a row sum to about n/2."""
    x = tokens(128)
    with torch.no_grad():
        shifted, bare = (make(shift=s).weights(x).sum(-1).mean() for s in (None, 0.0))
    assert shifted < 2 and bare > 0.4 * 128
