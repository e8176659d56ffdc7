"""Kimi Delta Attention: the layer by hand, its variants, its decoding, and what the delta rule is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attnlab.nn.linear.kda import KimiDeltaAttention, log_decay
from attnlab.nn.linear.linear_attention import LinearAttention
from attnlab.nn.linear.short_conv import ShortConv

DIM = 12
VARIANTS = {
    "plain": dict(heads=3),
    "grouped values": dict(heads=4, key_heads=2, head_dim=3, value_dim=5),
    "negative eigenvalues": dict(heads=3, negative_eigenvalues=True),
    "bounded decay": dict(heads=3, lower_bound=-5.0),
    "no convolution": dict(heads=3, conv=None),
    "all biases": dict(heads=3, conv_bias=True, gate_bias=True, rank=2),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def make(variant: str = "plain") -> KimiDeltaAttention:
    torch.manual_seed(0)
    m = KimiDeltaAttention(DIM, **VARIANTS[variant]).double().eval()
    for p in m.parameters():
        nn.init.normal_(p, std=0.5)
    return m


def tokens(n: int = 70) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


def by_hand(m: KimiDeltaAttention, x: Tensor, variant: str) -> Tensor:
    """The layer for one sample at a time, head by head and token by token, from the paper's formulas."""
    given = VARIANTS[variant]
    heads, key_heads = m.heads, given.get("key_heads", m.heads)
    d, dv = m.head_dim, m.value_dim
    outputs = []
    for sample in x:
        mixed = sample @ m.wqkv.weight.T
        if m.conv is not None:
            taps = m.conv.weight.shape[1]
            before = torch.cat([torch.zeros(taps - 1, mixed.shape[1]).double(), mixed])
            mixed = torch.stack([(before[t : t + taps] * m.conv.weight.T).sum(0) for t in range(len(sample))])
            mixed = mixed + (m.conv.bias if given.get("conv_bias") else 0)
        mixed = mixed / (1 + (-mixed).exp())
        q, k, v = mixed.split([key_heads * d, key_heads * d, heads * dv], -1)
        f = sample @ m.decay[0].weight.T @ m.decay[1].weight.T + m.dt_bias
        gate = torch.sigmoid(m.gate[1](m.gate[0](sample)))
        beta = torch.sigmoid(sample @ m.wbeta.weight.T) * (2 if given.get("negative_eigenvalues") else 1)
        y = torch.zeros(len(sample), heads * dv, dtype=torch.float64)
        for h in range(heads):
            keys = slice((h // (heads // key_heads)) * d, (h // (heads // key_heads) + 1) * d)
            values, rate = slice(h * dv, (h + 1) * dv), m.a_log[h].exp()
            state = torch.zeros(d, dv, dtype=torch.float64)
            for t in range(len(sample)):
                q_t = q[t, keys] / ((q[t, keys] ** 2).sum() + 1e-6).sqrt() / d**0.5
                k_t = k[t, keys] / ((k[t, keys] ** 2).sum() + 1e-6).sqrt()
                f_t = f[t, h * d : (h + 1) * d]
                g = -rate * (1 + f_t.exp()).log()
                if "lower_bound" in given:
                    g = given["lower_bound"] / (1 + (-rate * f_t).exp())
                state = torch.diag(g.exp()) @ state
                state = state + torch.outer(k_t, beta[t, h] * (v[t, values] - state.T @ k_t))
                o = state.T @ q_t
                y[t, values] = o / ((o**2).mean() + 1e-5).sqrt() * m.norm.weight
        outputs.append((y * gate) @ m.wo.weight.T)
    return torch.stack(outputs)


@variants
def test_equals_the_papers_formulas_written_out(variant: str):
    m, x = make(variant), tokens(20)
    with torch.no_grad():
        torch.testing.assert_close(m(x), by_hand(m, x, variant), rtol=1e-9, atol=1e-9)


@variants
def test_decoding_step_by_step_equals_the_chunked_pass(variant: str):
    m, x = make(variant), tokens()
    with torch.no_grad():
        state, steps = m.initial_state(2), []
        for t in range(x.shape[1]):
            y, state = m(x[:, t : t + 1], state=state)
            steps.append(y)
        torch.testing.assert_close(torch.cat(steps, 1), m(x), rtol=0, atol=1e-10)


def test_the_state_does_not_grow():
    m = make()
    sizes, state = set(), m.initial_state(2)
    for n in (1, 40, 2):
        with torch.no_grad():
            _, state = m(tokens(n), state=state)
        sizes.add((state.inputs.shape, state.memory.shape))
    assert sizes == {((2, 3, 3 * DIM), (2, 3, 4, 4))}


def test_decays_are_never_growth_and_the_bounded_ones_stay_above_their_bound():
    f = 30 * torch.randn(50, 3, 4)
    a_log, bias = torch.randn(3), torch.randn(12)
    assert (log_decay(f, a_log, bias) <= 0).all()
    bounded = log_decay(f, a_log, bias, -5.0)
    assert (bounded <= 0).all()
    assert (bounded >= -5).all()


def test_at_the_start_most_channels_remember_for_long():
    """softplus(dt_bias) is log-uniform between 0.001 and 0.1, times rates from 1 to 16: per step at most e^−1.6."""
    m = KimiDeltaAttention(64, heads=8)
    start = log_decay(torch.zeros(8, 8), m.a_log, m.dt_bias)
    assert start.min() >= -1.601
    assert start.max() <= -0.00099


def test_the_memory_is_kept_in_float32_when_the_layer_is_in_bfloat16():
    m = make().bfloat16()
    with torch.no_grad():
        y, state = m(tokens(5).bfloat16(), state=m.initial_state(2))
    assert y.dtype == state.inputs.dtype == torch.bfloat16
    assert state.memory.dtype == torch.float32


def test_the_convolution_equals_a_grouped_conv1d():
    conv, x = ShortConv(6, 4, bias=True).double(), torch.randn(2, 9, 6, dtype=torch.float64)
    nn.init.normal_(conv.bias)
    padded = nn.functional.pad(x.mT, (3, 0))
    wanted = nn.functional.conv1d(padded, conv.weight.unsqueeze(1), conv.bias, groups=6).mT
    torch.testing.assert_close(conv(x)[0], wanted)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        (dict(causal=False), "causal only"),
        (dict(heads=5), "heads must divide dim"),
        (dict(heads=4, key_heads=3), "key_heads must divide heads"),
        (dict(heads=4, lower_bound=0.5), "lower_bound"),
        (dict(heads=4, conv=0), "taps must be at least 1"),
    ],
)
def test_bad_arguments_are_named(keywords: dict, words: str):
    with pytest.raises(ValueError, match=words):
        KimiDeltaAttention(DIM, **keywords)


def test_cross_attention_and_patterns_are_refused():
    with pytest.raises(ValueError, match="no context"):
        make()(tokens(4), tokens(4))
    with pytest.raises(ValueError, match="no pattern"):
        make()(tokens(4), pattern=object())


def recall(mixer: nn.Module, *, names: int = 8, writes: int = 24, steps: int = 100, batch: int = 32) -> float:
    """Train one layer to recall what each name was last bound to; its accuracy on fresh texts.

    A text binds `names` names `writes` times to random values, so most are bound again, and then asks for each name in
    random order: multi-query associative recall (arXiv 2312.04927) with updates.
    """
    torch.manual_seed(0)
    name, value = nn.Embedding(names, mixer.dim), nn.Embedding(names + 1, mixer.dim)
    norm, head = nn.RMSNorm(mixer.dim), nn.Linear(mixer.dim, names)
    optimizer = torch.optim.AdamW(nn.ModuleList([mixer, name, value, norm, head]).parameters(), lr=1e-2, weight_decay=0)

    def text() -> tuple[Tensor, Tensor, Tensor]:
        first, asked = torch.rand(2, batch, names).argsort(-1)
        bound = torch.cat([first, torch.randint(names, (batch, writes - names))], 1)
        values = torch.randint(names, (batch, writes))
        latest = torch.zeros_like(first)
        for t in range(writes):
            latest.scatter_(1, bound[:, t : t + 1], values[:, t : t + 1])
        nothing = torch.full_like(asked, names)
        return torch.cat([bound, asked], 1), torch.cat([values, nothing], 1), latest.gather(1, asked)

    def answers(bound: Tensor, values: Tensor) -> Tensor:
        x = norm(name(bound) + value(values))
        return head(x + mixer(x))[:, writes:]

    for step in range(steps):
        *shown, wanted = text()
        loss = cross_entropy(answers(*shown).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        optimizer.step()
    with torch.no_grad():
        *shown, wanted = text()
        return (answers(*shown).argmax(-1) == wanted).float().mean().item()


def test_names_that_are_bound_again_are_recalled_where_linear_attention_fails():
    """The delta rule takes the old value out before it writes the new one; a sum of writes keeps both."""
    torch.manual_seed(0)
    kda = recall(KimiDeltaAttention(32, heads=1, conv=None))
    linear = recall(LinearAttention(32, heads=1, causal=True))
    assert kda > 0.9, f"KDA {kda:.2f}"
    assert linear < 0.7, f"linear attention {linear:.2f}"
