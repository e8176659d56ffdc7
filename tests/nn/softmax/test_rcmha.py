"""Relative convolutional attention: equal to its definition, and what its convolutions see."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad

from attnlab.nn.cache import KVCache
from attnlab.nn.multihead import MultiHead
from attnlab.nn.softmax.rcmha import RelativeConvolutionalAttention

DIM, HEADS, REACH = 12, 3, 16


def make(reach: int = REACH, **keywords) -> RelativeConvolutionalAttention:
    torch.manual_seed(0)
    m = RelativeConvolutionalAttention(DIM, heads=HEADS, reach=reach, **keywords).double().eval()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return m


def tokens(n: int = 7, batch: int = 2) -> Tensor:
    return torch.randn(batch, n, DIM, dtype=torch.float64)


def by_hand(m: RelativeConvolutionalAttention, x: Tensor, memory: Tensor | None = None) -> Tensor:
    """One sample, one head and one pair at a time, with torch's own convolution."""
    d, out = DIM // HEADS, []
    for b in range(len(x)):
        both = x[b] if memory is None else torch.cat((memory[b], x[b]))
        heads = []
        for h in range(HEADS):
            parts = []
            for p, source in enumerate((x[b], both, both)):
                row = p * DIM + h * d
                y = source @ m.wqkv.weight[row : row + d].T
                if p == 2:
                    y = y + m.value_bias[h * d : (h + 1) * d]
                if m.taps > 1:
                    filters = m.taps_weight[:, p, 0].T[:, None]  # (D, 1, taps)
                    y = conv1d(pad(y.T, (m.taps - 1, 0)), filters, m.taps_bias[p, 0], groups=d).T
                parts.append(y)
            q, k, v = parts
            rows = []
            for i in range(len(q)):
                at, scores = i + len(k) - len(q), []
                for j in range(at + 1 if m.causal else len(k)):
                    r = REACH - (at - j)
                    s = (q[i] + m.query_bias[h, 0]) @ k[j] + q[i] @ m.distance_key[r, h] + m.distance_bias[r, h]
                    scores.append(s / math.sqrt(d))
                rows.append(torch.stack(scores).softmax(0) @ v[: len(scores)])
            heads.append(torch.stack(rows))
        out.append(torch.cat(heads, -1) @ m.wo.weight.T + m.wo.bias)
    return torch.stack(out)


@pytest.mark.parametrize("taps", [1, 2, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_definition_with_and_without_memory(taps: int, causal: bool) -> None:
    m, x = make(taps=taps, causal=causal), tokens(5)
    torch.testing.assert_close(m(x), by_hand(m, x))
    memory = tokens(4)
    torch.testing.assert_close(m(x, memory=memory), by_hand(m, x, memory))
    torch.testing.assert_close(m(x[:, :1], memory=memory), by_hand(m, x[:, :1], memory))


def test_filters_that_pass_the_newest_token_and_empty_tables_leave_plain_attention() -> None:
    m, x = make(causal=True), tokens()
    for p in (m.taps_weight, m.taps_bias, m.distance_key, m.distance_bias, m.query_bias, m.value_bias, m.wo.bias):
        nn.init.zeros_(p)
    nn.init.ones_(m.taps_weight[-1])
    plain = MultiHead(DIM, heads=HEADS, causal=True).double()
    plain.load_state_dict({n: p for n, p in m.state_dict().items() if n in ("wqkv.weight", "wo.weight")})
    torch.testing.assert_close(m(x), plain(x))


def test_the_convolution_of_keys_crosses_into_the_memory_and_that_of_queries_does_not() -> None:
    m, x, memory = make(causal=True), tokens(3), tokens(4).requires_grad_()
    (q,), _ = m.convolve(x, slice(0, 1))
    (fresh,), _ = m.convolve(torch.cat((memory, x), 1), slice(0, 1))
    assert not torch.allclose(q[:, :, 0], fresh[:, :, 4])  # with memory the first query would differ
    m.convolve(torch.cat((memory, x), 1), slice(1, 3))[0][:, :, :, 4].sum().backward()
    assert memory.grad is not None
    assert bool((memory.grad[:, 2:] != 0).any(-1).all()) and not memory.grad[:, :2].any()


def test_memory_is_causal() -> None:
    m, x, memory = make(causal=True), tokens(6), tokens(5)
    other = torch.cat((x[:, :3], tokens(3)), 1)
    torch.testing.assert_close(m(x, memory=memory)[:, :3], m(other, memory=memory)[:, :3])


def test_pieces_give_what_the_whole_gives_and_a_copy_can_branch_off() -> None:
    m, x = make(causal=True), tokens(9)
    state, out = m.initial_state(2), []
    with torch.no_grad():
        for piece in x.split([1, 4, 1, 3], 1):
            branch = state.clone()
            m(tokens(2), state=branch)
            y, state = m(piece, state=state)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), m(x))


def test_counts_the_parameters_of_the_authors_class() -> None:
    with torch.device("meta"):
        m = RelativeConvolutionalAttention(128, heads=8)
    d = 128 // 8
    wanted = 4 * 128**2 + 2 * 128 + 3 * (3 * d + d) + 2 * 4096 * (128 + 8) + 128
    assert sum(p.numel() for p in m.parameters()) == wanted


def test_gradients_of_the_skewed_scores_are_right() -> None:
    m, x = make(causal=True, reach=4), tokens(3, 1).requires_grad_()

    def run(x: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(m, {"distance_key": keys, "distance_bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, m.distance_key, m.distance_bias))


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="reach and taps must be at least 1"):
        make(taps=0)
    m = make(causal=True)
    with pytest.raises(ValueError, match="at most reach = 16 tokens"):
        m(tokens(17))
    with pytest.raises(ValueError, match="at most reach = 16 tokens"):
        m(tokens(10), memory=tokens(7))
    with pytest.raises(ValueError, match="takes no context"):
        m(tokens(3), tokens(3))
    with pytest.raises(ValueError, match=r"memory must be \(2, M, 12\)"):
        m(tokens(3), memory=torch.randn(2, 3, DIM + 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="takes no memory"):
        m(tokens(3), memory=tokens(3), state=m.initial_state(2))
    with pytest.raises(TypeError, match="a ConvolvedCache, got KVCache"):
        m(tokens(3), state=KVCache())


def recall(taps: int, *, steps: int = 80, letters: int = 8, pairs: int = 10) -> float:
    """Accuracy of a single layer on the second letters of pairs (a, f(a)) seen before in a text with its own f."""
    torch.manual_seed(0)
    embed, head = nn.Embedding(letters, 32), nn.Linear(32, letters)
    mixer = RelativeConvolutionalAttention(32, heads=2, reach=2 * pairs, taps=taps, causal=True)
    optimizer = torch.optim.AdamW([*embed.parameters(), *head.parameters(), *mixer.parameters()], lr=1e-2)
    right = torch.zeros(())
    for _ in range(steps):
        table = torch.rand(64, letters, letters).argsort(-1)[..., 0]
        first = torch.randint(letters, (64, pairs))
        ids = torch.stack((first, table.gather(1, first)), -1).flatten(1)
        seen = (first[:, :, None] == first[:, None]).tril(-1).any(-1)
        logits = head(embed(ids) + mixer(embed(ids)))[:, ::2][seen]
        wanted = ids[:, 1::2][seen]
        loss = nn.functional.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right = 0.9 * right + 0.1 * (logits.argmax(-1) == wanted).float().mean()
    return right.item()


def test_with_the_convolution_one_layer_recalls_what_followed() -> None:
    """What the paper's convolution is for: a key that knows the token before it."""
    assert recall(3) > 0.9 > 0.6 > recall(1)
