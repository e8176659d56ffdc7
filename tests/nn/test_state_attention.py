"""The six linear attentions of Linear-Llama3 are their quadratic forms, and spread over ranks as a whole model."""

import copy

import pytest
import torch
import torch.nn.functional as F

from attnlab import scale
from attnlab.models.language.linear_llama import linear_llama
from attnlab.nn.linear.state_attention import KINDS, StateAttention
from attnlab.scale import simulate


def by_pairs(m: StateAttention, x: torch.Tensor) -> torch.Tensor:
    """Written out: every weight of every pair, in the order of the paper's formulas."""
    b, n, _ = x.shape
    q, k, v = (w(x).view(b, n, m.heads, -1).transpose(1, 2) for w in (m.wq, m.wk, m.wv))
    if m.kind in ("basic", "lightning"):
        weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    elif m.kind == "based":
        s = q @ k.mT / m.width**0.5
        weights = 1 + s + s * s / 2
    elif m.kind == "rebased":

        def square(t, i):
            normed = (t - t.mean(-1, keepdim=True)) / (t.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            return (m.gamma[i] * normed + m.beta[i]) ** 2

        weights = square(q, 0) @ square(k, 1).mT
    else:
        weights = q @ k.mT / m.head_dim**0.5
    distance = torch.arange(n)[:, None] - torch.arange(n)
    if m.kind == "lightning":
        weights = weights * torch.exp(-8 * torch.arange(m.heads).double() / m.heads)[
            :, None, None
        ] ** distance.clamp_min(0)
    if m.kind == "retention":
        weights = weights * (1 - 2.0 ** (-5 - torch.arange(m.heads).double()))[:, None, None] ** distance.clamp_min(0)
    if m.kind == "gla":
        along = (F.logsigmoid(m.gate(x)) / 16).view(b, n, m.heads, -1).transpose(1, 2).cumsum(2)
        steps = (along[:, :, :, None] - along[:, :, None]).exp()
        weights = torch.einsum("bhid,bhijd,bhjd->bhij", q, steps, k) / m.head_dim**0.5
    out = weights.tril() @ v
    out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm.weight
    return m.wo(out.transpose(1, 2).reshape(b, n, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_its_quadratic_form(kind: str) -> None:
    m = StateAttention(32, heads=4, kind=kind, width=6).double()
    x = torch.randn(2, 37, 32, dtype=torch.float64, requires_grad=True)
    ours, theirs = m(x), by_pairs(m, x)
    assert (ours - theirs).abs().max() < 1e-9 * theirs.abs().max().clamp_min(1)
    (a,), (b,) = (torch.autograd.grad(y.sin().sum(), x, retain_graph=True) for y in (ours, theirs))
    assert (a - b).abs().max() < 1e-9 * b.abs().max().clamp_min(1)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_streams(kind: str) -> None:
    m, x = StateAttention(32, heads=4, kind=kind, width=4), torch.randn(2, 11, 32)
    state, parts = m.initial_state(2), []
    for piece in x.split([3, 1, 7], 1):
        y, state = m(piece, state=state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), m(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["basic", "retention", "gla", "based"])
def test_a_hybrid_over_ranks_is_the_hybrid(kind: str) -> None:
    model = linear_llama(kind=kind, hybrid=2, vocabulary=50, dim=32, depth=2, heads=4).double()
    ids = torch.randint(50, (1, 24))
    wanted = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:])

    def rank(wire):
        parallel = scale.parallelize(copy.deepcopy(model), wire, method="allgather")
        return parallel.loss(parallel(ids), ids).detach()

    assert all(abs(loss - wanted) < 1e-10 for loss in simulate(3, rank))


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="kind must be one of basic"):
        StateAttention(32, heads=4, kind="mamba")
    with pytest.raises(ValueError, match="hybrid"):
        linear_llama(hybrid=0, vocabulary=8, dim=8, depth=1)
