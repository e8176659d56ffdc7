"""Taylor attention and the running mean: equal to their definitions written as matrices, stable, and as claimed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from attnlab.nn.linear.running_mean import RunningMean
from attnlab.nn.linear.taylor import BLOCK, TaylorAttention, powers, series
from attnlab.positions import ALiBi, Rotary

DIM, HEADS = 16, 2
D = DIM // HEADS


def tokens(n: int = 9) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


def heads_of(m, x: Tensor) -> list[Tensor]:
    return [t.view(*x.shape[:2], HEADS, D).transpose(1, 2) for t in m.wqkv(x).chunk(3, -1)]


def joined(m, heads: Tensor) -> Tensor:
    return m.wo(heads.transpose(1, 2).reshape(heads.shape[0], heads.shape[2], DIM))


def taylor_matrices(q: Tensor, k: Tensor, form: str, causal: bool, floor: float = 0.5) -> list[Tensor]:
    """The weights of each separately normalised part, N × N."""
    seen = torch.ones(q.shape[2], k.shape[2], dtype=q.dtype)
    seen = seen.tril() if causal else seen
    s = q @ k.mT / D**0.5
    if form == "taylor":
        parts = [1 + s + s**2 / 2]
    else:
        parts = [torch.ones_like(s), q @ k.mT, (q**2 @ (k**2).mT) / 2]
    totals = [(p * seen).sum(-1, keepdim=True) for p in parts]
    if form == "paper":
        size = q.norm(dim=-1, keepdim=True) * (seen @ (k**2).sum(-1, keepdim=True) * seen.sum(-1, keepdim=True)) ** 0.5
        totals[1] = totals[1].sign() * totals[1].abs().maximum(floor * size)
    return [p * seen / total for p, total in zip(parts, totals, strict=True)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", ["paper", "taylor"])
def test_taylor_equals_its_matrices(form: str, causal: bool) -> None:
    m, x = TaylorAttention(DIM, heads=HEADS, form=form, causal=causal).double(), tokens()
    q, k, v = heads_of(m, x)
    torch.testing.assert_close(m(x), joined(m, sum(a @ v for a in taylor_matrices(q, k, form, causal))))


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_the_first_orders_sum_is_kept_away_from_zero_by_a_share_of_what_it_could_be(floor: float) -> None:
    m, x = TaylorAttention(DIM, heads=HEADS, form="paper", floor=floor, causal=True).double(), tokens()
    q, k, v = heads_of(m, x)
    matrices = taylor_matrices(q, k, "paper", True, floor)
    torch.testing.assert_close(m(x), joined(m, sum(a @ v for a in matrices)))
    share = matrices[1].sum(-1).abs()  # 1 where it was large enough
    assert share.max() <= 1 + 1e-9 and ((share < 0.99).any() == (floor > 0))


def test_features_of_powers_multiply_to_the_series() -> None:
    q, k = torch.randn(2, 5, D, dtype=torch.float64), torch.randn(2, 6, D, dtype=torch.float64)
    torch.testing.assert_close(powers(q) @ powers(k).mT, series(q @ k.mT))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", ["paper", "taylor"])
def test_long_texts_are_read_by_features_of_what_is_far(form: str, causal: bool) -> None:
    m, x = TaylorAttention(DIM, heads=HEADS, form=form, causal=causal).double(), tokens(3 * BLOCK + 7)
    q, k, v = heads_of(m, x)
    torch.testing.assert_close(m(x), joined(m, sum(a @ v for a in taylor_matrices(q, k, form, causal))))


@pytest.mark.parametrize("form", ["paper", "taylor"])
def test_long_pieces_continue_a_state(form: str) -> None:
    m, x = TaylorAttention(DIM, heads=HEADS, form=form, causal=True).double(), tokens(2 * BLOCK + 40)
    state, out = m.initial_state(2), []
    for piece in x.split([BLOCK + 9, BLOCK + 31], 1):
        y, state = m(piece, state=state)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), m(x))


def test_taylor_weights_are_positive_and_near_softmax_where_scores_are_small() -> None:
    m, x = TaylorAttention(DIM, heads=HEADS, form="taylor", causal=True).double(), tokens()
    q, k, v = heads_of(m, 0.1 * x)
    (weights,) = taylor_matrices(q, k, "taylor", True)
    assert (weights >= 0).all()
    softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(m(0.1 * x), joined(m, softmax), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["paper", "taylor"])
def test_taylor_streams_with_rotary_positions(form: str) -> None:
    m, x = TaylorAttention(DIM, heads=HEADS, form=form, causal=True, position=Rotary(D)).double(), tokens()
    state, out = m.initial_state(2), []
    for piece in x.split([4, 1, 4], 1):
        y, state = m(piece, state=state)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), m(x))
    assert state[0] == 9


@pytest.mark.parametrize("zero", [slice(0, DIM), slice(DIM, 2 * DIM)])
def test_queries_or_keys_that_are_zero_do_not_divide_by_zero(zero: slice) -> None:
    m, x = TaylorAttention(DIM, heads=HEADS, form="paper", causal=True).double(), tokens()
    with torch.no_grad():
        m.wqkv.weight[zero] = 0  # and so is every first- and second-order sum
    y = m(x)
    y.sum().backward()
    assert y.isfinite().all() and m.wqkv.weight.grad.isfinite().all()


@pytest.mark.parametrize("causal", [True, False])
def test_the_running_mean_equals_its_definition(causal: bool) -> None:
    m, x = RunningMean(DIM, heads=HEADS, causal=causal).double(), tokens()
    q, k, v = heads_of(m, x)
    e = (silu(q) * k).sum(-1) / D**0.5
    rows = []
    for i in range(x.shape[1]):
        w = (e[..., : i + 1] if causal else e).softmax(-1)
        rows.append((w.unsqueeze(-1) * v[:, :, : w.shape[-1]]).sum(2))
    torch.testing.assert_close(m(x), joined(m, torch.stack(rows, 2)))


def test_the_running_mean_norms_queries_before_their_activation() -> None:
    m, x = RunningMean(DIM, heads=HEADS, causal=True, qk_norm=torch.nn.RMSNorm).double(), tokens()
    q, k, v = heads_of(m, x)
    q, k = (t / (t.square().mean(-1, keepdim=True) + torch.finfo(t.dtype).eps).sqrt() for t in (q, k))
    e = (silu(q) * k).sum(-1) / D**0.5
    rows = [(e[..., : i + 1].softmax(-1).unsqueeze(-1) * v[:, :, : i + 1]).sum(2) for i in range(x.shape[1])]
    torch.testing.assert_close(m(x), joined(m, torch.stack(rows, 2)))


def test_the_running_mean_does_not_overflow_in_float32() -> None:
    m = RunningMean(DIM, heads=HEADS, causal=True)
    with torch.no_grad():
        m.wqkv.weight *= 40
    x = torch.randn(1, 300, DIM, requires_grad=True)
    y = m(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all() and gradient.isfinite().all()
    torch.testing.assert_close(y, m.double()(x.double()).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [TaylorAttention, RunningMean])
def test_has_the_parameters_of_multi_head_attention(kind) -> None:
    assert sum(p.numel() for p in kind(DIM, heads=HEADS).parameters()) == 4 * DIM**2


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="form"):
        TaylorAttention(DIM, heads=HEADS, form="third")
    with pytest.raises(ValueError, match="floor must lie in 0 to 1, got 2"):
        TaylorAttention(DIM, heads=HEADS, floor=2)
    with pytest.raises(ValueError, match="position"):
        TaylorAttention(DIM, heads=HEADS, position=ALiBi(HEADS))
    with pytest.raises(ValueError, match="causal"):
        RunningMean(DIM, heads=HEADS).initial_state(1)
