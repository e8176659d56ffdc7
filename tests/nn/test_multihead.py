"""Multi-head attention and its cache, against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from attnlab.cost import count_flops
from attnlab.nn.cache import KVCache, RollingCache
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Causal, Documents, Explicit, Window
from attnlab.positions import ALiBi, BucketBias, Rotary, RotaryGrid, TableBias

DIM = 24


def make(**keywords) -> MultiHead:
    torch.manual_seed(0)
    return MultiHead(DIM, **{"heads": 4, "kv_heads": 2, **keywords}).double().eval()


def tokens(n: int = 9, batch: int = 2) -> Tensor:
    return torch.randn(batch, n, DIM, dtype=torch.float64)


def by_hand(m: MultiHead, x: Tensor, context: Tensor | None = None, *, seen=lambda i, j: True) -> Tensor:
    """One query, one head at a time."""
    source = x if context is None else context
    d, groups = m.head_dim, m.heads // m.kv_heads
    weight, bias = m.wqkv.weight, m.wqkv.bias

    def rows(token: Tensor, start: int) -> Tensor:
        y = weight[start : start + d] @ token
        return y if bias is None else y + bias[start : start + d]

    out = torch.zeros(*x.shape[:2], m.heads * d, dtype=x.dtype)
    for b in range(len(x)):
        for h in range(m.heads):
            at_k = (m.heads + h // groups) * d
            at_v = at_k + m.kv_heads * d
            for i in range(x.shape[1]):
                q = m.q_norm(rows(x[b, i], h * d))
                keys = [j for j in range(source.shape[1]) if seen(i, j)]
                scores = torch.stack([q @ m.k_norm(rows(source[b, j], at_k)) / math.sqrt(d) for j in keys])
                for weight_ij, j in zip(scores.softmax(0), keys, strict=True):
                    out[b, i, h * d : (h + 1) * d] += weight_ij * rows(source[b, j], at_v)
    return m.wo(out)


@pytest.mark.parametrize(
    "keywords",
    [dict(), dict(kv_heads=4), dict(kv_heads=1), dict(head_dim=5), dict(bias=True), dict(qk_norm=nn.RMSNorm)],
    ids=str,
)
def test_equals_the_definition(keywords: dict) -> None:
    m, x, context = make(**keywords), tokens(5), tokens(7)
    torch.testing.assert_close(m(x), by_hand(m, x))
    torch.testing.assert_close(m(x, context), by_hand(m, x, context))


@pytest.mark.parametrize("length", [3, 5, 8])
def test_causal_cross_attention_sees_the_context_up_to_its_own_index(length: int) -> None:
    m, x, context = make(causal=True), tokens(5), tokens(length)
    torch.testing.assert_close(m(x, context), by_hand(m, x, context, seen=lambda i, j: j <= i))


def test_a_pattern_given_with_the_call_narrows_it() -> None:
    x, mask = tokens(6), torch.rand(6, 6) < 0.5
    mask |= torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(
        make()(x, pattern=Explicit(mask)), by_hand(make(), x, seen=lambda i, j: bool(mask[i, j]))
    )
    m = make(causal=True)
    wanted = by_hand(m, x, seen=lambda i, j: j <= i and (i < 4) == (j < 4))
    torch.testing.assert_close(m(x, pattern=Documents((4, 2))), wanted)


POSITIONS = {
    "none": lambda: None,
    "rotary": lambda: Rotary(6),
    "alibi": lambda: ALiBi(4),
    "table": lambda: TableBias((40,), 4),
    "buckets": lambda: BucketBias(4, count=8, limit=16),
    "function": lambda: lambda q, k, offset: (q * (1 + offset), k),
}


@pytest.mark.parametrize("pieces", [[1] * 20, [7, 1, 1, 11], [20]], ids=str)
@pytest.mark.parametrize("position", [p for p in POSITIONS if p != "function"])
def test_pieces_give_what_the_whole_gives(position: str, pieces: list[int]) -> None:
    m, x = make(causal=True, position=POSITIONS[position]()), tokens(20)
    state, out = m.initial_state(2), []
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            y, state = m(piece, state=state)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), m(x), rtol=1e-9, atol=1e-9)


def test_pieces_under_a_pattern_give_what_the_whole_gives() -> None:
    m, x, state = make(causal=True), tokens(20), None
    with torch.no_grad():
        state, out = m.initial_state(2), []
        for piece in x.split([6, 1, 13], 1):
            y, state = m(piece, state=state, pattern=Window(5))
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), m(x, pattern=Window(5)), rtol=1e-9, atol=1e-9)


def test_a_step_that_sees_no_key_gives_zeros() -> None:
    m, x = make(causal=True), tokens(6)
    with torch.no_grad():
        _, state = m(x[:, :5], state=m.initial_state(2))
        y, _ = m(x[:, 5:], state=state, pattern=~Causal())
    assert torch.equal(y, torch.zeros_like(y))


def test_a_step_under_a_window_works_on_the_window_alone() -> None:
    m = make(causal=True)
    projections = 2 * 2 * DIM * (m.wqkv.out_features + DIM)
    with torch.no_grad():
        _, state = m(tokens(200), state=m.initial_state(2))
        work = count_flops(lambda: m(tokens(1), state=state, pattern=Window(5)))
    assert work == projections + 2 * 2 * 4 * 5 * (6 + 6)


def test_pieces_also_carry_gradients() -> None:
    m, x = make(causal=True), tokens(8).requires_grad_()
    state, out = m.initial_state(2), []
    for piece in x.split([3, 1, 4], 1):
        y, state = m(piece, state=state)
        out.append(y)
    (ours,) = torch.autograd.grad(torch.cat(out, 1).pow(2).sum(), x)
    (wanted,) = torch.autograd.grad(m(x).pow(2).sum(), x)
    torch.testing.assert_close(ours, wanted)


def test_a_bias_position_equals_adding_it_to_the_scores() -> None:
    m, x = make(position=ALiBi(4)), tokens(6)
    q, k, v = m.project(x)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    distance = (torch.arange(6)[:, None] - torch.arange(6)).abs()
    scores = q @ k.mT / math.sqrt(6) - m.position.slopes[:, None, None].double() * distance
    torch.testing.assert_close(m(x), m.merge(scores.softmax(-1) @ v))


def test_positions_on_a_grid_get_the_grid() -> None:
    m, x = make(head_dim=8, position=RotaryGrid(8)), tokens(6)
    assert not torch.allclose(m(x, grid=(2, 3)), m(x, grid=(3, 2)))
    with pytest.raises(ValueError, match="grid must have 2 axes"):
        m(x)


def test_weights_are_those_that_mix_the_values() -> None:
    m, x, context = make(causal=True, position=Rotary(6)), tokens(5), tokens(7)
    weights = m.weights(x, context)
    assert weights.shape == (2, 4, 5, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5, dtype=torch.float64))
    assert not weights.triu(1).any()
    v = m.project(x, context)[2].repeat_interleave(2, 1)
    torch.testing.assert_close(m.merge(weights @ v), m(x, context))


def test_dropout_drops_weights_in_training_only_and_keeps_the_mean() -> None:
    m, x = make(dropout=0.5), tokens(4, batch=1)
    assert torch.equal(m(x), m(x))
    kept = m(x)
    m.train()
    torch.manual_seed(0)
    drawn = torch.stack([m(x) for _ in range(2000)])
    assert drawn.std(0).min() > 0
    assert ((drawn.mean(0) - kept).abs() < 6 * drawn.std(0) / math.sqrt(2000)).all()


def test_the_cache_copies_nothing_old_while_it_has_room() -> None:
    cache, one = KVCache(), torch.ones(2, 3, 1, 4)
    moved, last = 0, 0
    for _ in range(1000):
        k, _ = cache.append(one, one)
        moved, last = moved + (k.data_ptr() != last), k.data_ptr()
    assert moved <= math.log2(1000)  # once per doubling
    assert cache.bytes() <= 2 * 1024 * cache.bytes_per_token()


def test_a_cloned_cache_goes_its_own_way() -> None:
    m, x = make(causal=True), tokens(6)
    with torch.no_grad():
        _, state = m(x[:, :5], state=m.initial_state(2))
        other = state.clone()
        m(tokens(9), state=other)
        y, _ = m(x[:, 5:], state=state)
        torch.testing.assert_close(y, m(x)[:, 5:])


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("pieces", [[1] * 30, [2, 1, 12, 1, 1, 13], [30]], ids=str)
def test_the_rolling_cache_holds_the_sinks_and_the_window(sinks: int, pieces: list[int]) -> None:
    """Each key carries its position as its value, so what comes back says where it came from."""
    cache, window, begin = RollingCache(5, sinks), 5, 0
    for n in pieces:
        piece = torch.arange(begin, begin + n, dtype=torch.float64).view(1, 1, n, 1)
        if n == 1:
            k, v = cache.step(piece, -piece)
            wanted = [p for p in range(begin + 1) if p < sinks or p > begin - window]
            assert sorted(k.flatten().tolist()) == wanted
            assert cache.positions().tolist() == k.flatten().tolist()
        else:
            k, v, gap = cache.extend(piece, -piece)
            at = k.flatten().long()
            assert torch.equal(at, torch.arange(len(at)) + gap * (torch.arange(len(at)) >= sinks))
            assert at[-1] == begin + n - 1 and (at[:sinks] < sinks).all()
            assert len(at) >= min(begin, sinks + window - 1) + n
        assert torch.equal(k, -v)
        begin += n
        assert cache.bytes() == 2 * (sinks + window) * 8


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: make(heads=5), ValueError, "heads must divide dim|kv_heads must divide"),
        (lambda: make(kv_heads=3), ValueError, "kv_heads must divide heads = 4, got 3"),
        (lambda: make(heads=0), ValueError, "heads must be at least 1"),
        (lambda: make().initial_state(2), ValueError, "causal=True"),
        (lambda: make()(tokens()[0]), ValueError, "x must have shape"),
        (lambda: make()(tokens(), tokens(batch=3)), ValueError, "batch size 2, got 3"),
        (lambda: make()(tokens(), pattern=torch.ones(9, 9)), TypeError, "pattern"),
        (lambda: make(causal=True)(tokens(), tokens(), state=KVCache()), ValueError, "takes no context"),
        (lambda: KVCache().k, ValueError, "empty"),
    ],
)
def test_errors_name_what_is_wrong(wrong, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrong()


def test_the_cache_of_another_batch_or_model_is_refused_unharmed() -> None:
    m, x = make(causal=True), tokens(4)
    with torch.no_grad():
        _, state = m(x, state=m.initial_state(2))
        for other in (tokens(1, batch=3),):
            with pytest.raises(ValueError, match="another model or batch"):
                m(other, state=state)
        with pytest.raises(ValueError, match="another model or batch"):
            make(causal=True, kv_heads=1)(x, state=state)
        with pytest.raises(ValueError, match="within the 4 tokens"):
            m(tokens(5), state=KVCache(limit=4))
        with pytest.raises(TypeError, match="pattern must be a Pattern"):
            m(x, state=state, pattern=torch.ones(4, 4))
        assert state.length == 4
