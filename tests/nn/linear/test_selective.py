"""Mamba and Mamba-2: the layers by hand, their states, and the filter of their steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnlab.nn.linear.selective import Mamba, Mamba2, Selective, first_steps

DIM = 6
VARIANTS = {
    "mamba": (Mamba, dict(states=3)),
    "mamba with all biases": (Mamba, dict(states=3, bias=True, rank=4, conv=2)),
    "mamba without convolution bias": (Mamba, dict(states=3, expand=3, conv_bias=False)),
    "mamba2": (Mamba2, dict(states=3, head_dim=4)),
    "mamba2 in groups": (Mamba2, dict(states=3, head_dim=2, groups=3)),
    "mamba2 with all biases": (Mamba2, dict(states=3, head_dim=2, bias=True, conv=2, conv_bias=False)),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def make(variant: str) -> Selective:
    torch.manual_seed(0)
    kind, keywords = VARIANTS[variant]
    m = kind(DIM, **keywords).double().eval()
    for p in m.parameters():
        nn.init.normal_(p, std=0.5)
    return m


def tokens(n: int = 40) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def convolved(m: Selective, x: Tensor) -> Tensor:
    taps = m.conv.weight.shape[1]
    seen = torch.cat([x.new_zeros(taps - 1, x.shape[1]), x])
    y = torch.stack([(seen[t : t + taps].T * m.conv.weight).sum(1) for t in range(len(x))])
    return silu(y if m.conv.bias is None else y + m.conv.bias)


def softplus(x: Tensor) -> Tensor:
    return (1 + x.exp()).log()


def mamba_by_hand(m: Mamba, u: Tensor) -> Tensor:
    x, z = m.wi(u).chunk(2, -1)
    x = convolved(m, x)
    r, b, c = m.wx(x).split([m.rank, m.states, m.states], -1)
    delta = softplus(r @ m.wdelta.weight.T + m.wdelta.bias)
    h, y = torch.zeros(m.inner, m.states, dtype=torch.float64), []
    for t in range(len(u)):
        h = torch.exp(delta[t].unsqueeze(1) * -m.a_log.exp()) * h + torch.outer(delta[t] * x[t], b[t])
        y.append(h @ c[t] + m.skip * x[t])
    return m.wo(torch.stack(y) * silu(z))


def mamba2_by_hand(m: Mamba2, u: Tensor) -> Tensor:
    mixed = u @ m.wi.weight.T + (0 if m.wi.bias is None else m.wi.bias)
    z, xbc, r = mixed.split([m.inner, m.inner + 2 * m.groups * m.states, m.heads], -1)
    x, b, c = convolved(m, xbc).split([m.inner, m.groups * m.states, m.groups * m.states], -1)
    delta, y = softplus(r + m.bias), torch.zeros(len(u), m.inner, dtype=torch.float64)
    for head in range(m.heads):
        group = head // (m.heads // m.groups)
        own, shared = (slice(i * n, (i + 1) * n) for i, n in ((head, m.head_dim), (group, m.states)))
        h = torch.zeros(m.head_dim, m.states, dtype=torch.float64)
        for t in range(len(u)):
            d = delta[t, head]
            h = torch.exp(-d * m.a_log[head].exp()) * h + d * torch.outer(x[t, own], b[t, shared])
            y[t, own] = h @ c[t, shared] + m.skip[head] * x[t, own]
    y = (y * silu(z)).unflatten(1, (m.groups, -1))
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return m.wo(y.flatten(1) * m.norm)


@variants
def test_equals_the_papers_equations_written_out(variant: str):
    m, x = make(variant), tokens(12)
    by_hand = mamba_by_hand if isinstance(m, Mamba) else mamba2_by_hand
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


@pytest.mark.parametrize(
    ("variant", "numbers"),
    # Per sequence: E·(S + taps − 1), and E·S + (taps − 1)·(E + 2·groups·S), with E = 12.
    [("mamba", 12 * (3 + 3)), ("mamba2", 12 * 3 + 3 * (12 + 2 * 3)), ("mamba2 in groups", 12 * 3 + 3 * (12 + 6 * 3))],
)
def test_the_state_has_the_stated_size_whatever_the_length(variant: str, numbers: int):
    m = make(variant)
    state = m.initial_state(2)
    for n in (1, 30, 2):
        with torch.no_grad():
            _, state = m(tokens(n), state=state)
        assert state.inputs.numel() + state.memory.numel() == 2 * numbers


def test_memories_are_kept_in_float32_when_the_layer_is_in_bfloat16():
    m = make("mamba2").bfloat16()
    with torch.no_grad():
        y, state = m(tokens(5).bfloat16(), state=m.initial_state(2))
    assert y.dtype == state.inputs.dtype == torch.bfloat16
    assert state.memory.dtype == torch.float32


@pytest.mark.parametrize("variant", ["mamba", "mamba2"])
def test_a_token_whose_step_is_filtered_away_leaves_no_trace_in_the_memory(variant: str):
    m, x = make(variant), tokens(9)
    m.step_filter = lambda delta: torch.cat([delta[:, :6], torch.zeros_like(delta[:, 6:])], 1)
    with torch.no_grad():
        filtered = m(x, state=m.initial_state(2))[1].memory
        m.step_filter = None
        torch.testing.assert_close(filtered, m(x[:, :6], state=m.initial_state(2))[1].memory, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["mamba", "mamba2"])
def test_the_state_of_another_batch_is_refused(variant: str):
    m = make(variant)
    with pytest.raises(ValueError, match="batch = 3, not 2"):
        m(tokens(), state=m.initial_state(3))


def test_first_steps_lie_between_a_thousandth_and_a_tenth():
    steps = nn.functional.softplus(first_steps(1000))
    assert 0.00099 < steps.min() < 0.0015
    assert 0.08 < steps.max() < 0.1001


@pytest.mark.parametrize(
    ("kind", "keywords", "words"),
    [
        (Mamba, dict(causal=False), "causal only"),
        (Mamba, dict(states=0), "states must be"),
        (Mamba, dict(expand=0), "expand must be"),
        (Mamba2, dict(head_dim=5), "head_dim must divide"),
        (Mamba2, dict(head_dim=4, groups=2), "groups must divide"),
    ],
)
def test_bad_arguments_are_named(kind: type, keywords: dict, words: str):
    with pytest.raises(ValueError, match=words):
        kind(DIM, **keywords)
