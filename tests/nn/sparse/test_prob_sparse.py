"""ProbSparse: its steps one by one, who is active, the mean for the others, samples."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnlab.nn.sparse.prob_sparse import ProbSparseAttention

D = torch.float64


def by_hand(m: ProbSparseAttention, x: Tensor, sample: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    tokens = x.shape[1]
    active = min(tokens, m.factor * math.ceil(math.log(tokens)))
    heads = v.mean(2, keepdim=True).expand_as(v).clone()
    for b in range(len(x)):
        for h in range(m.heads):
            scores = [torch.stack([q[b, h, i] @ k[b, h, j] for j in sample[i]]) for i in range(tokens)]
            measured = [(s.max() - s.sum() / tokens).item() for s in scores]
            for i in sorted(range(tokens), key=lambda i: -measured[i])[:active]:
                heads[b, h, i] = (q[b, h, i] @ k[b, h].T / m.head_dim**0.5).softmax(0) @ v[b, h]
    return m.merge(heads)


def test_equals_its_steps() -> None:
    m, x = ProbSparseAttention(16, heads=2, factor=2).double().eval(), torch.randn(2, 50, 16, dtype=D)
    torch.testing.assert_close(m(x), by_hand(m, x, m.sample(50, x.device)))
    sample = torch.randint(50, (50, 8))
    torch.testing.assert_close(m(x, sample=sample), by_hand(m, x, sample))


def test_queries_far_from_uniform_are_the_ones_that_look() -> None:
    m = ProbSparseAttention(16, heads=1, factor=1, bias=False).double().eval()
    with torch.no_grad():  # queries are the first half of a token, keys the second
        m.wqkv.weight[:32].zero_()
        m.wqkv.weight[:8, :8].copy_(torch.eye(8))
        m.wqkv.weight[16:24, 8:].copy_(torch.eye(8))
    x, loud = torch.randn(1, 100, 16, dtype=D), torch.tensor([7, 31, 80])
    x[:, :, :8] *= 0.01
    x[:, loud, :8] *= 1000
    q, k, v = m.qkv(x)
    full, found = m.merge(scaled_dot_product_attention(q, k, v)), m(x)
    torch.testing.assert_close(found[:, loud], full[:, loud])
    quiet = (found - m.merge(v.mean(2, keepdim=True))).abs().amax(-1)[0] < 1e-12
    assert int(quiet.sum()) == 100 - m.count(100) and not quiet[loud].any()


def test_samples_are_the_seeds_spread_over_all_keys_and_drawn_anew_in_training() -> None:
    first, second = (ProbSparseAttention(16, seed=seed).eval() for seed in (0, 1))
    device = torch.device("cpu")
    sample = first.sample(2000, device)
    assert torch.equal(sample, first.sample(2000, device)) and not torch.equal(sample, second.sample(2000, device))
    counts = torch.bincount(sample.flatten(), minlength=2000).double()
    assert counts.min() > 0 and counts.std() / counts.mean().sqrt() < 1.2  # as of independent draws
    assert sample.min() == 0 and sample.max() == 1999
    first.train()
    assert not torch.equal(first.sample(50, device), first.sample(50, device))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="factor"):
        ProbSparseAttention(16, factor=0)
    with pytest.raises(ValueError, match="causal must be False"):
        ProbSparseAttention(16, causal=True)
