"""The memory written once per chunk: what each token may know, its limits, and its state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnlab.hub.official.titans import NeuralMemory as Adapter
from attnlab.nn.memory.chunk_memory import ChunkMemory

DIM = 8


def make(**keywords) -> ChunkMemory:
    torch.manual_seed(0)
    m = ChunkMemory(DIM, **{"heads": 2, "chunk": 4, "expansion": 2.0, **keywords}).double().eval()
    for p in m.parameters():
        nn.init.normal_(p, std=0.5)
    return m


def tokens(n: int = 23) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


def known(m: ChunkMemory, x: Tensor, t: int) -> list[int]:
    """The tokens that the output of token t depends on."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(m(x)[:, t].square().sum(), x)
    return gradient.abs().sum((0, 2)).nonzero().flatten().tolist()


def test_a_token_knows_itself_and_the_chunks_that_are_whole():
    m, x = make(), tokens(11)
    assert known(m, x, 2) == [2]
    assert known(m, x, 3) == [0, 1, 2, 3]
    assert known(m, x, 5) == [0, 1, 2, 3, 5]
    assert known(m, x, 10) == [*range(8), 10]


def test_without_a_rate_the_first_weights_speak():
    m, x = make(max_rate=0.0), tokens()
    with torch.no_grad():
        m.forget.weight.zero_()
        m.forget.bias.fill_(-1e9)
        state = m.initial_state(2)
        first = torch.cat([m(token, state=state)[0] for token in x.split(1, 1)], 1)
        torch.testing.assert_close(m(x), first, rtol=0, atol=1e-12)


def test_forgetting_everything_leaves_the_last_surprise():
    m = make()
    with torch.no_grad():
        m.forget.weight.zero_()
        m.forget.bias.fill_(1e9)
        _, state = m(tokens(), state=m.initial_state(2))
    for w, s in zip(state.weights, state.momentum, strict=True):
        torch.testing.assert_close(w, s, rtol=0, atol=0)


@pytest.mark.parametrize("chunk", [1, 3, 70])
@pytest.mark.parametrize(
    "keywords", [{}, dict(momentum=False, qk_norm=True), dict(heads=1, residual=False, out_norm=True)]
)
def test_decoding_in_pieces_equals_the_whole_pass(chunk: int, keywords: dict):
    m, x = make(chunk=chunk, **keywords), tokens(75)
    with torch.no_grad():
        state, out = m.initial_state(2), []
        for piece in x.split([1] * 8 + [60] + [1] * 7, 1):
            y, state = m(piece, state=state)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), m(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("keywords", [{}, dict(momentum=False), dict(heads=1, residual=False, depth=1)])
def test_large_and_small_chunks_are_computed_alike(keywords: dict, monkeypatch: pytest.MonkeyPatch):
    m, found = make(chunk=5, **keywords), []
    for large in (1, 100):
        monkeypatch.setattr("attnlab.nn.memory.chunk_memory.LARGE", large)
        x = torch.linspace(-1, 1, 2 * 23 * DIM, dtype=torch.float64).sin().view(2, 23, DIM).requires_grad_()
        y, state = m(x, state=m.initial_state(2))
        loss = (y * torch.arange(23.0)[:, None]).sum() + sum(
            w.square().sum() for w in (*state.weights, *state.momentum)
        )
        found.append([y, *state.weights, *state.momentum, *torch.autograd.grad(loss, [x, *m.parameters()])])
    for large_chunks, small_chunks in zip(*found, strict=True):
        torch.testing.assert_close(large_chunks, small_chunks, rtol=1e-9, atol=1e-9)


def test_the_state_is_two_sets_of_weights_and_less_than_a_chunk_of_tokens():
    m = make()
    state, weights = m.initial_state(2), 2 * (4 * 8 + 8 * 4 + 4)
    for n in (1, 30, 2, 1):
        with torch.no_grad():
            _, state = m(tokens(n), state=state)
        assert sum(t.numel() for t in (*state.weights, *state.momentum)) == 2 * 2 * weights
        assert state.pending.shape[1] < m.chunk


def test_other_memories_of_the_open_implementation_are_refused_by_name():
    with pytest.raises(ValueError, match="momentum_order"):
        Adapter.build({"dim": 8, "momentum_order": 2}, {})
    with pytest.raises(ValueError, match="chunk_size"):
        Adapter.build({"dim": 8, "chunk_size": (2, 4)}, {})


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        (dict(causal=False), "causal only"),
        (dict(chunk=0), "chunk must be"),
        (dict(max_rate=-0.1), "max_rate must be"),
        (dict(heads=1, head_dim=4), "head_dim must be dim"),
    ],
)
def test_bad_arguments_are_named(keywords: dict, words: str):
    with pytest.raises(ValueError, match=words):
        ChunkMemory(DIM, **keywords)


def test_the_state_of_another_batch_or_length_of_chunk_is_refused():
    m = make()
    for state, words in (
        (m.initial_state(3), "batch = 3, not 2"),
        (make(chunk=7).initial_state(2), "chunk = 7, not 4"),
    ):
        with pytest.raises(ValueError, match=words):
            m(tokens(), state=state)
