"""Titans' three ways to join attention and memory: each written out, who sees what, and their states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnlab.nn.memory.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer, Paired
from attnlab.positions import ALiBi, Rotary

DIM, HEADS, PERSISTENT = 8, 2, 3
NEAR = {MemoryAsContext: dict(segment=5), MemoryAsGate: dict(window=4), MemoryAsLayer: dict(window=4)}
kinds = pytest.mark.parametrize("kind", NEAR, ids=lambda k: k.__name__)


def make(kind: type, **keywords) -> nn.Module:
    torch.manual_seed(0)
    given = {"heads": HEADS, "persistent": PERSISTENT, "memory": dict(chunk=3, max_rate=0.1), **NEAR[kind], **keywords}
    m = kind(DIM, **given).double().eval()
    for p in m.parameters():
        nn.init.normal_(p, std=0.5)
    return m


def tokens(n: int = 17) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Heads side by side in the last axis, one softmax at a time."""
    out = []
    for q_, k_, v_ in zip(*(t.unflatten(-1, (HEADS, -1)).unbind(-2) for t in (q, k, v)), strict=True):
        scores = (q_ @ k_.mT / q_.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        out.append(scores.softmax(-1) @ v_)
    return torch.cat(out, -1)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def gated(m: nn.Module, near: Tensor, memory: Tensor) -> Tensor:
    return normed(near, m.norm_near.weight) * normed(memory, m.norm_memory.weight).sigmoid()


def window_by_hand(m: nn.Module, x: Tensor) -> Tensor:
    i, j = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])
    mask = (j <= i) & ((i - j < m.attention.window) | (j < PERSISTENT))
    return m.attention.wo(softmax_attention(*m.attention.wqkv(x).chunk(3, -1), mask))


def by_hand(m: nn.Module, x: Tensor) -> Tensor:
    first = m.persistent.expand(len(x), -1, -1)
    if isinstance(m, MemoryAsGate):
        x = torch.cat([first, x], 1)
        return gated(m, window_by_hand(m, x), m.memory(x))[:, PERSISTENT:]
    if isinstance(m, MemoryAsLayer):
        return window_by_hand(m, m.memory(torch.cat([first, x], 1)))[:, PERSISTENT:]
    out, memory = [], m.memory.initial_state(len(x))
    for start in range(0, x.shape[1], m.segment):
        now = x[:, start : start + m.segment]
        size = now.shape[1]
        # What the memory says to all of x with the weights from before the segment, of which the segment's part counts.
        h = m.memory.recall(x, memory.weights)[0][:, start : start + size]
        keys, values = m.wkv(torch.cat([first, h, now], 1)).chunk(2, -1)
        past = torch.ones(size, size).tril().bool()
        mask = torch.cat([torch.ones(size, PERSISTENT).bool(), past, past], 1)
        y = m.wo(softmax_attention(m.wq(now), keys, values, mask))
        written, memory = m.memory(y, state=memory)
        out.append(gated(m, y, written))
    return torch.cat(out, 1)


@kinds
def test_equals_the_papers_equations_written_out(kind: type):
    m, x = make(kind), tokens()
    with torch.no_grad():
        torch.testing.assert_close(m(x), by_hand(m, x), rtol=0, atol=1e-10)


@kinds
@pytest.mark.parametrize("keywords", [{}, dict(persistent=0), dict(position=Rotary(DIM // HEADS))])
def test_decoding_in_pieces_equals_the_whole_pass(kind: type, keywords: dict):
    m, x = make(kind, **keywords), tokens(31)
    with torch.no_grad():
        whole = m(x)
        for sizes in ([1] * 31, [7, 1, 1, 12, 10]):
            state, out = m.initial_state(2), []
            for piece in x.split(sizes, 1):
                y, state = m(piece, state=state)
                out.append(y)
            torch.testing.assert_close(torch.cat(out, 1), whole, rtol=0, atol=1e-10)


@kinds
def test_a_token_knows_what_lies_far_beyond_attention(kind: type):
    m, x = make(kind), tokens(31).requires_grad_()
    (gradient,) = torch.autograd.grad(m(x)[:, -1].square().sum(), x)
    assert (gradient[:, 0] != 0).any()


def test_the_context_shows_no_token_its_own_future():
    m, x = make(MemoryAsContext, segment=12), tokens(12).requires_grad_()
    for t in (0, 4, 10):
        (gradient,) = torch.autograd.grad(m(x)[:, t].square().sum(), x)
        assert not gradient[:, t + 1 :].any()


def test_pairs_are_seen_up_to_ones_own():
    assert Paired(2).matrix(2, 6).tolist() == [[True] * 4 + [False] * 2, [True] * 6]


@kinds
def test_the_state_does_not_grow_with_the_text(kind: type):
    m = make(kind)
    attended = {MemoryAsContext: PERSISTENT + 2 * 5, MemoryAsGate: PERSISTENT + 4, MemoryAsLayer: PERSISTENT + 4}[kind]
    state = m.initial_state(2)
    for n in (5, 30, 5):
        with torch.no_grad():
            _, state = m(tokens(n), state=state)
        if kind is MemoryAsContext:
            kept = state.keys.numel() + state.values.numel()
        else:
            kept = state.near.bytes() // 8
        assert kept == 2 * 2 * attended * DIM


@kinds
def test_bad_arguments_are_named(kind: type):
    for keywords, words in (
        (dict(causal=False), "causal only"),
        (dict(persistent=-1), "persistent"),
        (dict(heads=3), "heads"),
    ):
        with pytest.raises(ValueError, match=words):
            make(kind, **keywords)


def test_positions_and_segments_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="turn queries and keys"):
        make(MemoryAsContext, position=ALiBi(HEADS))
    with pytest.raises(ValueError, match="segment must be"):
        make(MemoryAsContext, segment=0)
    m = make(MemoryAsContext)
    other = make(MemoryAsContext, segment=6)
    for state, words in ((m.initial_state(3), "batch = 3, not 2"), (other.initial_state(2), "segment = 6, not")):
        with pytest.raises(ValueError, match=words):
            m(tokens(), state=state)
