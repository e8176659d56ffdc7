"""Softmax with a learned slot: one more key by the definition, its limits, and every way in which it is computed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab.nn.multihead import MultiHead
from attnlab.nn.softmax.kv_bias import KVBias
from attnlab.patterns import Causal, Full, Pattern, Window
from attnlab.positions import ALiBi, Rotary
from attnlab.weightings import Softmax

DIM = 24


def make(**keywords) -> KVBias:
    torch.manual_seed(0)
    module = KVBias(DIM, **{"heads": 4, **keywords}).double().eval()
    for bias in (module.k_bias, module.v_bias):
        if bias is not None:
            torch.nn.init.normal_(bias)
    return module


def tokens(n: int = 7) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("key", "value"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("pattern", [None, Full(), Causal(), Window(3)], ids=str)
def test_equals_one_more_key_and_value(
    kv_heads: int, per_head: bool, key: bool, value: bool, pattern: Pattern | None
) -> None:
    m, x, d = make(kv_heads=kv_heads, key=key, value=value, per_head=per_head), tokens(), 6
    q, k, v = m.qkv(x)
    seen = (pattern or Full()).matrix(7)
    out = []
    for h in range(4):
        g = h * kv_heads // 4
        slot = [None if b is None else b[g if key else h] if per_head else b for b in (m.k_bias, m.v_bias)]
        scores = (q[:, h] @ k[:, g].mT / math.sqrt(d)).masked_fill(~seen, -math.inf)
        if key:
            scores = torch.cat((q[:, h] @ slot[0][:, None] / math.sqrt(d), scores), -1)
            values = torch.cat(((torch.zeros(d) if slot[1] is None else slot[1]).expand(2, 1, -1), v[:, g]), 1)
            out.append(scores.softmax(-1) @ values)
        else:
            out.append(scores.softmax(-1) @ v[:, g] + slot[1])
    torch.testing.assert_close(m(x, pattern=pattern), torch.cat(out, -1) @ m.wo.weight.T)


def test_a_key_that_nobody_likes_leaves_softmax() -> None:
    m, x = make(causal=True, bias=True), tokens()
    with torch.no_grad():
        m.wqkv.bias[:DIM] = 10.0  # all queries point one way, and k* the other
        m.k_bias.fill_(-10.0)
    plain = MultiHead(DIM, heads=4, causal=True, bias=True).double()
    plain.load_state_dict({n: t for n, t in m.state_dict().items() if n not in ("k_bias", "v_bias")})
    torch.testing.assert_close(m(x), plain(x))
    with torch.no_grad():
        m.k_bias.fill_(0.1)
    assert (m(x) - plain(x)).abs().max() > 1e-2


def test_a_zero_key_without_value_is_softmax_off_by_one() -> None:
    m, x = make(value=False), tokens()
    torch.nn.init.zeros_(m.k_bias)
    q, k, _ = m.project(x)
    wanted = Softmax(1.0).weights(q @ k.mT / math.sqrt(6), torch.ones(7, 7, dtype=torch.bool), 7)
    torch.testing.assert_close(m.weights(x), wanted)


def test_the_slot_has_no_position() -> None:
    """All queries alike and turned not at all: the slot's score is the same at every place, with ALiBi too."""
    m = make(position=ALiBi(4), causal=True, value=False)
    torch.nn.init.zeros_(m.wqkv.weight)
    slot = m.weights(tokens(), slot=True)[..., 0]
    decay = torch.exp(-ALiBi(4).slopes.double()[:, None, None] * (torch.arange(7)[:, None] - torch.arange(7)))
    torch.testing.assert_close(slot[0], 1 / (1 + decay.tril().sum(-1)))


def test_weights_with_the_slot_sum_to_one_and_give_the_output() -> None:
    m, x = make(causal=True, kv_heads=2), tokens()
    weights = m.weights(x, slot=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7, dtype=torch.float64))
    torch.testing.assert_close(weights[..., 1:], m.weights(x))
    v = m.project(x)[2]
    values = torch.cat((m.slot(m.v_bias, v), v), 2).repeat_interleave(2, 1)
    torch.testing.assert_close(m.merge(weights @ values), m(x))


def test_every_route_gives_the_same() -> None:
    """Prepended with a square causal matrix, merged by log-sum-exp, or step by step."""
    m, x = make(causal=True, position=Rotary(6)), tokens()
    whole = m(x)
    torch.testing.assert_close(m(x, pattern=Window(7)), whole)
    state, out = m.initial_state(2, dtype=torch.float64), []
    for piece in x.split([3, 1, 3], 1):
        y, state = m(piece, state=state)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), whole)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="key or value"):
        make(key=False, value=False)
    with pytest.raises(ValueError, match="slot must be False"):
        make(key=False).weights(tokens(), slot=True)
