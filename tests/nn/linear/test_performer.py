"""Performer: random features estimate the exponential, orthogonal ones better; causal without a look ahead."""

import math

import pytest
import torch

from attnlab.nn.linear.performer import Performer, orthogonal_directions
from attnlab.nn.multihead import MultiHead

D = torch.float64


def softmax_twin(m: Performer) -> MultiHead:
    twin = MultiHead(m.dim, heads=m.heads, bias=True).double()
    twin.load_state_dict({n: p for n, p in m.state_dict().items() if n[0] == "w"})
    return twin


def test_products_of_features_estimate_the_exponential() -> None:
    m = Performer(8, heads=1, random_features=40_000, eps=0.0).double()
    q, k = torch.randn(2, 1, 1, 5, 8, dtype=D) * 0.4
    features_q, features_k = m.mapped(q, k, 0)
    found = features_q @ features_k.mT
    wanted = (q @ k.mT / math.sqrt(8)).exp()
    ratio = found / wanted  # queries are divided by their largest feature, which is one factor for each
    assert (ratio / ratio.mean(-1, keepdim=True) - 1).abs().max() < 0.05


def test_more_features_come_closer_to_softmax_attention() -> None:
    x, errors = torch.randn(1, 64, 16, dtype=D), []
    for features in (16, 256, 4096):
        m = Performer(16, heads=1, random_features=features).double()
        torch.manual_seed(1)
        torch.nn.init.normal_(m.wqkv.weight, std=0.1)
        twin, of_draws = softmax_twin(m), []
        for seed in range(5):
            m.redraw(torch.Generator().manual_seed(seed))
            of_draws.append((m(x) - twin(x)).detach().square().mean())
        errors.append(float(torch.stack(of_draws).mean().sqrt()))
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2]


def test_directions_are_orthogonal_in_blocks_and_as_long_as_gaussian_ones() -> None:
    w = orthogonal_directions(3, 20, 8, generator=torch.Generator().manual_seed(0))
    unit = w / w.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(unit[:, :8] @ unit[:, :8].mT, torch.eye(8).expand(3, 8, 8), atol=1e-5, rtol=0)
    assert w.shape == (3, 20, 8) and unit[:, 0].mul(unit[:, 8]).sum(-1).abs().max() > 1e-3
    many = orthogonal_directions(1, 8000, 8, generator=torch.Generator().manual_seed(0))
    assert many.mean().abs() < 0.01 and many.square().mean().item() == pytest.approx(1.0, abs=0.02)


def test_causal_equals_all_pairs_of_features_below_the_diagonal() -> None:
    m, x = Performer(16, heads=2, random_features=12, causal=True).double(), torch.randn(2, 70, 16, dtype=D)
    q, k, v = m.qkv(x)
    q, k = m.mapped(q, k, 0)
    pairs = (q @ k.mT).tril()
    torch.testing.assert_close(m(x), m.merge(pairs / pairs.sum(-1, keepdim=True) @ v))


def test_padding_has_no_influence() -> None:
    m, x = Performer(16, heads=2).double(), torch.randn(2, 12, 16, dtype=D)
    keep = torch.arange(12).expand(2, 12) < 9
    other = torch.where(keep[..., None], x, 5 * torch.randn_like(x))
    torch.testing.assert_close(m(x, other, keep=keep), m(x, x, keep=keep))
    torch.testing.assert_close(m(x, x, keep=keep), m(x, x[:, :9]))


def test_features_are_the_seeds_and_can_be_drawn_anew() -> None:
    first, second = Performer(16, heads=2, seed=3), Performer(16, heads=2, seed=3)
    assert torch.equal(first.projection, second.projection)
    second.redraw(torch.Generator().manual_seed(4))
    assert not torch.equal(first.projection, second.projection)
    assert "projection" in first.state_dict()


def test_the_leaking_causal_form_of_the_release_is_refused() -> None:
    with pytest.raises(ValueError, match="leaks"):
        Performer(16, variant="release", causal=True)
    with pytest.raises(ValueError, match="random_features"):
        Performer(16, random_features=0)
