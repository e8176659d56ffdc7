"""LARA: its equations by hand, landmarks, noise in training alone, padding."""

import pytest
import torch
from torch import Tensor

from attnlab.nn.linear.randomized import RandomizedAttention

D = torch.float64


def by_hand(m: RandomizedAttention, x: Tensor) -> Tensor:
    """Query by query and landmark by landmark, with weights before logarithms."""
    q, k, v = m.qkv(x)
    heads, tokens, root = torch.zeros_like(q), x.shape[1], m.head_dim**0.5
    segments = min(m.landmarks, tokens)
    size, longer = divmod(tokens, segments)
    sizes = [size] * (segments - longer) + [size + 1] * longer

    def kappa(t: Tensor, w: Tensor) -> Tensor:
        return ((t @ w - t @ t / 2) / root).exp()

    for b in range(len(x)):
        for h in range(m.heads):
            parts = zip(q[b, h].split(sizes), k[b, h].split(sizes), strict=True)
            marks = [a.mean(0) + c.mean(0) for a, c in parts]
            of_keys = [torch.stack([kappa(key, mu) for key in k[b, h]]) for mu in marks]
            mixed = [w @ v[b, h] / w.sum() for w in of_keys]
            for n, query in enumerate(q[b, h]):
                weights = torch.stack(
                    [
                        (mu @ query / root).exp() * kappa(query, mu) * w.sum() / kappa(mu, mu)
                        for mu, w in zip(marks, of_keys, strict=True)
                    ]
                )
                heads[b, h, n] = weights / weights.sum() @ torch.stack(mixed)
    return m.merge(heads)


@pytest.mark.parametrize("tokens", [3, 20, 23])
def test_equals_its_equations(tokens: int) -> None:
    m, x = RandomizedAttention(16, heads=2, landmarks=5).double().eval(), torch.randn(2, tokens, 16, dtype=D)
    torch.testing.assert_close(m(x), by_hand(m, x))


def test_noise_is_drawn_in_training_alone() -> None:
    m, x = RandomizedAttention(16, heads=2, landmarks=4).train(), torch.randn(1, 20, 16)
    assert not torch.equal(m(x), m(x))
    torch.manual_seed(5)
    first = m(x)
    torch.manual_seed(5)
    assert torch.equal(m(x), first)
    m.eval()
    assert torch.equal(m(x), m(x))


def test_padding_has_no_influence() -> None:
    m, x = RandomizedAttention(16, heads=2, landmarks=4).double().eval(), torch.randn(2, 20, 16, dtype=D)
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[0, :3], keep[1, 13:] = False, False
    other = torch.where(keep[..., None], x, 3 * torch.randn_like(x))
    torch.testing.assert_close(m(other, keep=keep)[keep], m(x, keep=keep)[keep])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="causal must be False"):
        RandomizedAttention(16, causal=True)
    with pytest.raises(ValueError, match="landmarks"):
        RandomizedAttention(16, landmarks=0)
