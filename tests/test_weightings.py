"""Each weighting by its formula, its derivative, and what it does with keys that are not seen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import attend
from attnlab.patterns import Causal, Explicit, Window
from attnlab.weightings import Affine, Elementwise, Elu, Linear, Relu, Shares, Sigmoid, Softmax, Weighting, weighting

SIMPLE = [Sigmoid(), Sigmoid(-1.5), Relu(), Relu(2), Elu(), Linear()]
FORMULAS = {
    Sigmoid(): lambda s, n: 1 / (1 + n * math.exp(-s)),  # σ(s − log n)
    Sigmoid(-1.5): lambda s, n: 1 / (1 + math.exp(1.5 - s)),
    Relu(): lambda s, n: max(s, 0.0) / n,
    Relu(2): lambda s, n: max(s, 0.0) ** 2 / n,
    Elu(): lambda s, n: s + 1 if s > 0 else math.exp(s),
    Linear(): lambda s, n: s,
}


def scores(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("how", SIMPLE, ids=str)
def test_elementwise_weights_follow_their_formula(how: Elementwise) -> None:
    s, seen = scores(4, 7), torch.rand(4, 7) < 0.7
    ours = how.weights(s, seen, 7)
    for i in range(4):
        for j in range(7):
            wanted = FORMULAS[how](s[i, j].item(), 7) if seen[i, j] else 0.0
            assert ours[i, j].item() == pytest.approx(wanted, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("how", SIMPLE, ids=str)
def test_the_derivative_is_that_of_the_weights(how: Elementwise) -> None:
    s = scores(4, 7).requires_grad_()
    weights = how.apply(s, 7)
    (wanted,) = torch.autograd.grad(weights.sum(), s)
    torch.testing.assert_close(how.derivative(s.detach(), weights.detach(), 7), wanted)


@pytest.mark.parametrize("how", SIMPLE, ids=str)
def test_apply_leaves_the_scores_alone(how: Elementwise) -> None:
    s = scores(3, 5)
    kept = s.clone()
    how.apply(s, 5).add_(1.0)
    assert torch.equal(s, kept)


def test_shares_divide_what_is_seen_by_its_sum() -> None:
    s, seen = scores(5, 6), torch.rand(5, 6) < 0.5
    seen[0] = False
    ours = Shares(Elu()).weights(s, seen, 6)
    raw = Elu().weights(s, seen, 6)
    torch.testing.assert_close(ours, raw / (raw.sum(-1, keepdim=True) + 1e-8))
    q, k, v = (torch.randn(1, 2, 40, 8, dtype=torch.float64) for _ in range(3))
    how = dict(weighting=Shares(Elu()), pattern=Window(5))
    torch.testing.assert_close(attend(q, k, v, backend="tiles", **how), attend(q, k, v, backend="reference", **how))


@pytest.mark.parametrize("off", [0.0, 1.0, 0.3])
def test_softmax_divides_by_the_seen_and_the_offset(off: float) -> None:
    s, seen = scores(5, 6), torch.rand(5, 6) < 0.5
    seen[0] = False
    ours = Softmax(off).weights(s, seen, 6)
    for i in range(5):
        total = sum(math.exp(s[i, j]) for j in range(6) if seen[i, j]) + off
        for j in range(6):
            wanted = math.exp(s[i, j]) / total if seen[i, j] else 0.0
            assert ours[i, j].item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("off", [0.0, 1.0])
@pytest.mark.parametrize("level", [-1e4, 1e4])
def test_softmax_is_finite_far_out_and_so_is_its_gradient(off: float, level: float) -> None:
    s = (scores(3, 4) + level).requires_grad_()
    seen = torch.ones(3, 4, dtype=torch.bool)
    seen[0] = False
    weights = Softmax(off).weights(s, seen, 4)
    (gradient,) = torch.autograd.grad(weights.pow(2).sum(), s)
    assert weights.isfinite().all() and gradient.isfinite().all()
    wanted = 0.0 if off and level < 0 else 1.0
    assert weights[1:].sum(-1).tolist() == pytest.approx([wanted] * 2)


@pytest.mark.parametrize("pattern", [None, Causal(), Window(3), Explicit(torch.eye(6).bool())], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_affine_attention_is_the_matrix_of_its_weights(pattern, kv_heads: int) -> None:
    q = scores(2, 4, 6, 8)
    k, v = (scores(2, kv_heads, 6, 8) for _ in "kv")
    factor, total = torch.rand(2, 4, 6, 1, dtype=torch.float64), torch.rand(4, 1, 1, dtype=torch.float64)
    how = Affine(factor, total)
    seen = torch.ones(6, 6, dtype=torch.bool) if pattern is None else pattern.matrix(6)
    wide = [t.repeat_interleave(4 // kv_heads, 1) for t in (k, v)]
    weights = how.weights(q @ wide[0].mT / math.sqrt(8), seen, 6)
    torch.testing.assert_close(weights.sum(-1), total.expand(2, 4, 6, 1)[..., 0])
    torch.testing.assert_close(attend(q, k, v, pattern=pattern, weighting=how), weights @ wide[1])


def test_affine_queries_that_see_nothing_give_zeros() -> None:
    q, mask = scores(1, 2, 3, 4), torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    y = attend(q, q, q, pattern=Explicit(mask), weighting=Affine(torch.full((1, 2, 3, 1), 0.4, dtype=torch.float64)))
    assert not y[:, :, 1].any() and y[:, :, 0].all()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(None, Softmax()), ("softmax", Softmax()), ("sigmoid", Sigmoid()), ("relu", Relu()), ("none", Linear()),
     (Relu(2), Relu(2))],
)  # fmt: skip
def test_weightings_go_by_name_too(given: str | Weighting | None, wanted: Weighting) -> None:
    assert weighting(given) == wanted


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="weighting must be a Weighting or one of softmax, sigmoid, relu, none"):
        weighting("cosine")
    with pytest.raises(ValueError, match="power must be 1 or 2"):
        Relu(3)
    q = scores(1, 2, 3, 4)
    with pytest.raises(ValueError, match="return_lse"):
        attend(q, q, q, weighting=Affine(torch.ones(1, 2, 3, 1)), return_lse=True)
