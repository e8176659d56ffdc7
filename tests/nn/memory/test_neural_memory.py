"""Titans' neural memory: the layer by hand, the delta rule inside it, its limits, its state, and what it is for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attnlab.models.skeletons.decoder import Decoder
from attnlab.nn.memory.neural_memory import NeuralMemory, pieces
from attnlab.nn.sparse.streaming_llm import SlidingWindow

DIM = 6
VARIANTS = {
    "two layers": dict(heads=2, chunk=5),
    "matrix": dict(heads=3, chunk=4, depth=1),
    "residual, no momentum": dict(heads=2, chunk=3, momentum=False, residual=True, max_rate=0.3),
    "small gradients": dict(heads=2, chunk=5, max_grad_norm=0.1),
    "gradients as they are": dict(heads=2, chunk=5, max_grad_norm=math.inf),
    "no convolution": dict(heads=1, chunk=1, conv=None, head_dim=4),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def make(variant: str = "two layers", **keywords) -> NeuralMemory:
    torch.manual_seed(0)
    m = NeuralMemory(DIM, **{**VARIANTS[variant], **keywords}).double().eval()
    for p in m.parameters():
        nn.init.normal_(p, std=0.5)
    return m


def tokens(n: int = 23) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


def silu(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def convolved(conv: nn.Module | None, x: Tensor) -> Tensor:
    if conv is None:
        return silu(x)
    taps = conv.weight.shape[1]
    seen = torch.cat([x.new_zeros(taps - 1, x.shape[1]), x])
    return silu(torch.stack([(seen[t : t + taps].T * conv.weight).sum(1) for t in range(len(x))]))


def network(x: Tensor, weights: list[Tensor], depth: int) -> Tensor:
    y = x @ weights[0]
    for w in weights[1:depth]:
        y = silu(y) @ w
    if len(weights) > depth:
        y = x + (1 + weights[depth]) * (y - y.mean()) / (y.var(unbiased=False) + 1e-5).sqrt()
    return y


def by_hand(m: NeuralMemory, x: Tensor) -> Tensor:
    """One sample, head by head and token by token, with autograd's gradients at the weights of the chunk's start."""
    d, q = m.head_dim, convolved(m.conv_q, m.wq(x))
    k, v = convolved(m.conv_kv, m.wkv(x)).chunk(2, -1)
    raw, heads = m.rates(x).sigmoid().split(m.heads, -1), []
    for h in range(m.heads):
        own = slice(h * d, (h + 1) * d)
        weights = [w[h].detach().clone() for w in m.memory.matrices]
        weights += [] if m.memory.gain is None else [m.memory.gain[h, 0].detach().clone()]
        momentum, said = [torch.zeros_like(w) for w in weights], []
        for t in range(len(x)):
            if t % m.chunk == 0:
                anchor = [w.clone().requires_grad_() for w in weights]
            q_t, k_t = (z[t, own] / (z[t, own].square().sum() + 1e-6).sqrt() for z in (q, k))
            with torch.enable_grad():
                loss = (network(k_t.detach(), anchor, m.memory.depth) - v[t, own].detach()).square().sum()
            gradients = torch.autograd.grad(loss, anchor)
            length = sum(g.square().sum() for g in gradients).sqrt()
            gradients = [g / (1 + (length / m.memory.max_grad_norm) ** 2).sqrt() for g in gradients]
            rate, forget = m.max_rate * raw[0][t, h], raw[-1][t, h]
            push = raw[1][t, h] if m.momentum else 0.0
            momentum = [push * s - rate * g for s, g in zip(momentum, gradients, strict=True)]
            weights = [(1 - forget) * w + s for w, s in zip(weights, momentum, strict=True)]
            y = network(q_t, weights, m.memory.depth)
            said.append(y / (y.square().mean() + 1e-5).sqrt() * m.norm.weight)
        heads.append(torch.stack(said))
    return m.wo(torch.cat(heads, -1) * m.gate(x).sigmoid())


@variants
def test_equals_the_papers_equations_written_out(variant: str):
    m, x = make(variant), tokens(13)
    with torch.no_grad():
        wanted = torch.stack([by_hand(m, sample) for sample in x])
        torch.testing.assert_close(m(x), wanted, rtol=1e-9, atol=1e-9)


@variants
def test_decoding_step_by_step_equals_the_whole_pass(variant: str):
    m, x = make(variant), tokens()
    with torch.no_grad():
        state, steps = m.initial_state(2), []
        for token in x.split(1, 1):
            y, state = m(token, state=state)
            steps.append(y)
        torch.testing.assert_close(torch.cat(steps, 1), m(x), rtol=0, atol=1e-10)


def test_a_matrix_written_at_every_token_is_the_delta_rule():
    """depth 1, chunk 1, no momentum, nothing forgotten: W ← W + β k (v − Wᵀk)ᵀ with β = 2θ (arXiv 2406.06484)."""
    m = make("matrix", chunk=1, momentum=False, conv=None, max_rate=0.4, max_grad_norm=math.inf)
    with torch.no_grad():
        m.rates.bias[m.heads :] = -1e9  # α = 0
        m.rates.weight[m.heads :] = 0
        x = tokens(9)
        q, k = (torch.nn.functional.normalize(silu(z).unflatten(-1, (m.heads, -1)), dim=-1, eps=0)
                for z in (m.wq(x), m.wkv(x).chunk(2, -1)[0]))  # fmt: skip
        v = silu(m.wkv(x).chunk(2, -1)[1]).unflatten(-1, (m.heads, -1))
        beta = 2 * m.max_rate * m.rates(x)[..., : m.heads].sigmoid()
        w, said = m.memory.matrices[0].expand(2, -1, -1, -1), []
        for t in range(9):
            error = v[:, t] - (k[:, t].unsqueeze(-2) @ w).squeeze(-2)
            w = w + beta[:, t, :, None, None] * k[:, t].unsqueeze(-1) * error.unsqueeze(-2)
            said.append((q[:, t].unsqueeze(-2) @ w).squeeze(-2))
        wanted = m.wo(m.norm(torch.stack(said, 1)).flatten(-2) * m.gate(x).sigmoid())
        # Unit vectors are made with 1e-6 under the root.
        torch.testing.assert_close(m(x), wanted, rtol=0, atol=1e-4)


def test_without_a_rate_only_the_forgotten_first_weights_speak():
    m, x = make("matrix", max_rate=0.0), tokens()
    with torch.no_grad():
        m.rates.bias[-m.heads :] = -1e9
        m.rates.weight[-m.heads :] = 0
        wanted, _ = m.recall(x, m.memory.initial(2, torch.float64))
        torch.testing.assert_close(m(x), wanted, rtol=0, atol=1e-12)


def test_the_state_is_three_sets_of_weights_and_the_convolutions_inputs():
    m = make("two layers")
    weights = 2 * (3 * 6 + 6 * 3)
    state = m.initial_state(2)
    for n in (1, 30, 2):
        with torch.no_grad():
            _, state = m(tokens(n), state=state)
        sets = [*state.weights, *state.momentum, *state.anchor]
        assert sum(t.numel() for t in sets) == 2 * 3 * weights
        assert state.past_q.numel() + state.past_kv.numel() == 2 * 3 * (3 * DIM)


def test_weights_stay_finite_over_a_long_text_of_equal_tokens():
    """The worst case of a chunk: all its keys are one, and its gradients are taken before any of them is learned."""
    m = NeuralMemory(DIM, heads=2)
    with torch.no_grad():
        _, state = m(torch.ones(1, 4000, DIM), state=m.initial_state(1))
    assert all(w.isfinite().all() and w.abs().max() < 100 for w in state.weights)


HARD = {
    "equal tokens": 30 * torch.ones(1, 256, DIM),
    "large tokens": 30 * torch.randn(2, 256, DIM, generator=torch.Generator().manual_seed(1)),
    "alternating tokens": 10 * torch.ones(1, 256, DIM) * torch.tensor([1.0, -1.0]).repeat(128)[:, None],
}


@pytest.mark.parametrize("text", HARD)
@pytest.mark.parametrize("bound", [None, math.inf])
def test_memory_and_gradients_stay_finite_where_steps_are_too_long_and_only_with_the_bound(
    text: str, bound: float | None
):
    """Weights like those of a trained network: M some three times its first size, long momentum."""
    torch.manual_seed(0)
    m = NeuralMemory(DIM, heads=2, max_grad_norm=bound)
    with torch.no_grad():
        for w in (*m.memory.matrices, m.wkv.weight):
            w.mul_(3)
        m.rates.bias[m.heads : -m.heads] = 2.0
    x = HARD[text].clone().requires_grad_()
    y, state = m(x, state=m.initial_state(len(x)))
    y.square().mean().backward()
    gradients = [x.grad, *(p.grad for p in m.parameters())]
    finite = all(t.isfinite().all() for t in (y, *state.weights, *gradients))
    assert finite == (bound is None)


@pytest.mark.parametrize("place", [0, 1, 4])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 17])
def test_pieces_end_where_chunks_end(place: int, length: int):
    sizes = pieces(place, length, 5)
    assert sum(sizes) == length
    assert min(sizes) > 0
    ends = torch.tensor(sizes).cumsum(0) + place
    assert (ends[:-1] % 5 == 0).all()


def test_the_state_of_another_memory_batch_or_length_of_chunk_is_refused():
    m = make()
    cases = [
        (m.initial_state(3), "batch = 3, not 2"),
        (make(expansion=3.0).initial_state(2), "another memory or batch"),
        (make(chunk=7).initial_state(2), "chunk = 7, not"),
    ]
    for state, words in cases:
        with pytest.raises(ValueError, match=words):
            m(tokens(), state=state)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        (dict(causal=False), "causal only"),
        (dict(chunk=0), "chunk must be"),
        (dict(max_rate=-1.0), "max_rate must be"),
        (dict(heads=4), "heads must divide"),
        (dict(heads=2, depth=0), "depth must be"),
        (dict(heads=2, max_grad_norm=0.0), "max_grad_norm must be"),
    ],
)
def test_bad_arguments_are_named(keywords: dict, words: str):
    with pytest.raises(ValueError, match=words):
        NeuralMemory(DIM, **keywords)


def pairs(batch: int, gap: int = 12) -> tuple[Tensor, Tensor]:
    """Texts k₁v₁ k₂v₂ k₃v₃, a gap of filler, then one of the keys; and the value that belongs to it."""
    keys = torch.rand(batch, 6).argsort(1)[:, :3]
    values = 6 + torch.randint(6, (batch, 3))
    asked = torch.randint(3, (batch, 1))
    told = torch.stack([keys, values], 2).flatten(1)
    text = torch.cat([told, torch.full((batch, gap), 12), keys.gather(1, asked)], 1)
    return text, values.gather(1, asked).squeeze(1)


def test_it_recalls_pairs_from_beyond_a_window_of_attention():
    """Chance is 1/6, and all that a window of 8 tokens can do, from which no gradient reaches the pairs."""
    torch.manual_seed(0)
    memory = Decoder(
        vocabulary=13, dim=24, depth=1, heads=1, hidden=24, mixer="neural_memory", position="none",
        mixer_options=dict(chunk=4, depth=1),
    )  # fmt: skip
    optimiser = torch.optim.AdamW(memory.parameters(), lr=1e-2)
    for _ in range(150):
        text, value = pairs(32)
        optimiser.zero_grad()
        cross_entropy(memory(text, last=True)[:, 0], value).backward()
        optimiser.step()
    with torch.no_grad():
        text, value = pairs(500)
        assert (memory(text, last=True)[:, 0].argmax(-1) == value).float().mean() > 0.6

    window = SlidingWindow(DIM, heads=1, window=8, sinks=0, causal=True)
    x = torch.randn(1, text.shape[1], DIM, requires_grad=True)
    (gradient,) = torch.autograd.grad(window(x)[:, -1].sum(), x)
    assert not gradient[:, :6].any()
