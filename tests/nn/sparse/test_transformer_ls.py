"""Transformer-LS: one softmax over window and summaries by hand, the second norm, padding."""

import pytest
import torch
from torch import Tensor

from attnlab.nn.mechanism import join_heads, split_heads
from attnlab.nn.sparse.transformer_ls import WindowAndSummaries

D = torch.float64


def by_hand(m: WindowAndSummaries, x: Tensor) -> Tensor:
    """One row of scores for each query: all summaries, all tokens, and −∞ where it may not look."""
    tokens, h, r = x.shape[1], m.heads, m.summaries
    q, k, v = m.qkv(x)
    k, v = (split_heads(m.near_norm(join_heads(t)), h) for t in (k, v))
    logits = m.wp(x).view(len(x), tokens, h, r).transpose(1, 2)
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    if m.causal:
        near = (j <= i) & (j > i - m.window)
        spans = [(a, a + m.chunk) for a in range(0, tokens - m.chunk + 1, m.chunk)]
        far = (torch.arange(len(spans) * r) // r) < (i // m.chunk)
    else:
        start, side = i // m.window * m.window, max(m.window // 2, 1)
        near = (j >= start - side) & (j < start + m.window + side)
        spans, far = [(0, tokens)], torch.ones(tokens, r, dtype=torch.bool)
    made = []
    for t in (k, v):
        parts = [logits[:, :, a:b].softmax(2).mT @ t[:, :, a:b] for a, b in spans]
        flat = torch.cat(parts, 2) if parts else t[:, :, :0]
        made.append(split_heads(m.far_norm(join_heads(flat)), h))
    scores = torch.cat((q @ made[0].mT, q @ k.mT), -1) / m.head_dim**0.5
    scores = scores.masked_fill(~torch.cat((far, near), 1), -torch.inf)
    return m.merge(scores.softmax(-1) @ torch.cat((made[1], v), 2))


@pytest.mark.parametrize(("tokens", "causal"), [(23, False), (5, False), (24, False), (29, True), (3, True)])
def test_equals_one_softmax_over_summaries_and_window(tokens: int, causal: bool) -> None:
    m = WindowAndSummaries(16, heads=2, window=6, summaries=3, chunk=5, causal=causal).double()
    x = torch.randn(2, tokens, 16, dtype=D, requires_grad=True)
    found, wanted = m(x), by_hand(m, x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, wanted)))


def test_the_second_norm_makes_summaries_as_large_as_tokens() -> None:
    """Averages of many independent keys are small: without the norm they would hardly be looked at."""
    m = WindowAndSummaries(64, heads=2, summaries=4)
    logits, k = torch.zeros(1, 2, 400, 4), torch.randn(1, 2, 400, 32)
    raw = (logits.softmax(2).mT @ k).norm(dim=-1).mean()
    far, _ = m.summarise(logits, k, k)
    assert raw < 0.1 * k.norm(dim=-1).mean() and far.norm(dim=-1).mean() > 0.8 * k.norm(dim=-1).mean()


def test_padding_has_no_influence() -> None:
    m, x = WindowAndSummaries(16, heads=2, window=6, summaries=3).double(), torch.randn(2, 20, 16, dtype=D)
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[0, :3], keep[1, 13:] = False, False
    other = torch.where(keep[..., None], x, 3 * torch.randn_like(x))
    torch.testing.assert_close(m(other, keep=keep)[keep], m(x, keep=keep)[keep])
    torch.testing.assert_close(m(x, keep=keep)[~keep], m.wo.bias.expand(10, -1))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="window must be at least chunk"):
        WindowAndSummaries(16, window=8, chunk=16, causal=True)
    with pytest.raises(ValueError, match="summaries"):
        WindowAndSummaries(16, summaries=0)
