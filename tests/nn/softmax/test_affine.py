"""Affine-scaled attention: both ways of counting by hand, its average, and its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnlab.nn.multihead import MultiHead
from attnlab.nn.softmax.affine import AffineScaledAttention
from attnlab.patterns import Explicit, Window

DIM = 24


def make(average: float | None = 0.7, **keywords) -> AffineScaledAttention:
    torch.manual_seed(0)
    m = AffineScaledAttention(DIM, **{"heads": 4, "kv_heads": 2, **keywords}).double().eval()
    nn.init.normal_(m.wa.weight)
    if average is not None:
        m.average.copy_(average + 0.1 * torch.arange(len(m.average)).view(-1, 1, 1))
    return m


def plain(m: AffineScaledAttention) -> MultiHead:
    other = MultiHead(DIM, heads=4, kv_heads=2, causal=m.causal).double().eval()
    other.load_state_dict({n: p for n, p in m.state_dict().items() if n.split(".")[0] in ("wqkv", "wo")})
    return other


def tokens(n: int = 7) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


def dense(m: AffineScaledAttention, x: Tensor, seen: Tensor, context: Tensor | None = None) -> Tensor:
    """The paper's A = α P + β with the whole matrix, (B, H, N, M)."""
    softmax = plain(m).weights(x, context, pattern=Explicit(seen))
    score = torch.einsum("bnc,hc->bhn", x, m.wa.weight)[..., None]
    alpha = torch.where(score <= -5, 0.0, torch.where(score >= 5, 1.0, 0.1 * score + 0.5))
    count = seen.sum(-1, keepdim=True) if m.count == "visible" else seen.shape[-1]
    return (alpha * softmax + (m.average - alpha) / count) * seen


MASKS = {
    "full": (dict(), None, torch.ones(7, 7).bool()),
    "causal": (dict(causal=True), None, torch.ones(7, 7).tril().bool()),
    "window": (dict(causal=True), Window(3), torch.ones(7, 7).tril().triu(-2).bool()),
}


@pytest.mark.parametrize("count", ["visible", "keys"])
@pytest.mark.parametrize("kind", MASKS)
def test_the_efficient_form_equals_the_matrix(kind: str, count: str) -> None:
    keywords, pattern, seen = MASKS[kind]
    m, x = make(count=count, **keywords), tokens()
    weights = dense(m, x, seen)
    v = m.project(x)[2].repeat_interleave(2, 1)
    torch.testing.assert_close(m(x, pattern=pattern), m.merge(weights @ v))
    torch.testing.assert_close(m.weights(x, pattern=pattern), weights)


@pytest.mark.parametrize("length", [3, 7, 9])
@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_equals_the_matrix(causal: bool, length: int) -> None:
    m, x, context = make(causal=causal), tokens(), tokens(length)
    seen = torch.ones(7, length).bool()
    weights = dense(m, x, seen.tril() if causal else seen, context)
    torch.testing.assert_close(m.weights(x, context), weights)


@pytest.mark.parametrize("count", ["visible", "keys"])
def test_it_is_softmax_attention_where_everything_is_one(count: str) -> None:
    m, x = make(average=None, count=count, causal=True), torch.ones(2, 7, DIM, dtype=torch.float64)
    x = x + 0.01 * tokens()
    nn.init.constant_(m.wa.weight, 1.0)
    m.average.fill_(1.0)
    assert (m.alpha(x) == 1).all()
    torch.testing.assert_close(m(x), plain(m)(x))


def test_visible_rows_sum_to_the_average_and_key_rows_to_the_formula() -> None:
    x = tokens()
    visible, keys = make(causal=True), make(causal=True, count="keys")
    wanted = visible.average.expand(2, 4, 7, 1)[..., 0]
    torch.testing.assert_close(visible.weights(x).sum(-1), wanted)
    share = torch.arange(1, 8, dtype=torch.float64)[:, None] / 7
    alpha = keys.alpha(x)
    torch.testing.assert_close(keys.weights(x).sum(-1, keepdim=True), alpha * (1 - share) + keys.average * share)


def test_a_query_that_takes_nothing_gets_the_mean_of_what_it_sees() -> None:
    m, x = make(average=None, causal=True), 1 + 0.01 * tokens()
    nn.init.constant_(m.wa.weight, -1.0)
    m.average.fill_(0.3)
    assert (m.alpha(x) == 0).all()
    v = m.project(x)[2].repeat_interleave(2, 1)
    mean = v.cumsum(2) / torch.arange(1, 8, dtype=torch.float64)[:, None]
    torch.testing.assert_close(m(x), m.merge(0.3 * mean))


@pytest.mark.parametrize(
    ("score", "wanted"), [(-9.0, 0.0), (-5.0, 0.0), (0.0, 0.5), (1.0, 0.6), (5.0, 1.0), (9.0, 1.0)]
)
def test_clipping_is_linear_between_minus_five_and_five(score: float, wanted: float) -> None:
    m, x = make(), torch.zeros(1, 1, DIM, dtype=torch.float64)
    x[..., 0] = 1.0
    nn.init.zeros_(m.wa.weight)
    m.wa.weight.data[:, 0] = score
    torch.testing.assert_close(m.alpha(x), torch.full((1, 4, 1, 1), wanted, dtype=torch.float64))


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_the_average_moves_in_training_only_after_its_use(scope: str) -> None:
    m, x = make(average=None, scope=scope, rate=0.9), tokens()
    m(x)
    assert not m.average.any()
    before = m.eval()(x)
    assert torch.equal(m.train()(x), before)
    steps = 5
    for _ in range(steps - 1):
        m(x)
    alpha = m.alpha(x).mean(dim=(0, 2)) if scope == "head" else m.alpha(x).mean().view(1, 1)
    torch.testing.assert_close(m.average[:, 0], alpha * (1 - 0.9**steps))
    m.weights(x)
    torch.testing.assert_close(m.average[:, 0], alpha * (1 - 0.9**steps))


def test_it_starts_with_half_of_everything() -> None:
    m = AffineScaledAttention(DIM, heads=4)
    assert (m.alpha(torch.randn(1, 3, DIM)) == 0.5).all()
    assert not m.average.any()
    assert (AffineScaledAttention(DIM, heads=4, start=0.5).average == 0.5).all()


def test_it_adds_one_weight_per_channel_and_head() -> None:
    m = make()
    assert sum(p.numel() for p in m.parameters()) - sum(p.numel() for p in plain(m).parameters()) == DIM * 4
    assert m.average.numel() == 4


def test_a_gate_comes_after_the_scaling() -> None:
    m, x = make(gate="head", causal=True), tokens()
    bare = make(causal=True)
    bare.load_state_dict({n: p for n, p in m.state_dict().items() if not n.startswith("wg")})
    q, k, v = m.project(x)
    heads = bare.mix(q, k, v, x=x, pattern=bare.where(None, 0, 7))
    torch.testing.assert_close(m(x), m.merge(heads * m.wg(x).sigmoid().mT[..., None]))


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 6]], ids=str)
@pytest.mark.parametrize("pattern", [None, Window(4)], ids=str)
def test_pieces_give_what_the_whole_gives(pattern, pieces: list[int]) -> None:
    m, x = make(causal=True), tokens(12)
    state, out = m.initial_state(2), []
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            y, state = m(piece, state=state, pattern=pattern)
            out.append(y)
            state = state.clone()
        torch.testing.assert_close(torch.cat(out, 1), m(x, pattern=pattern))


def test_the_running_sum_survives_bfloat16() -> None:
    m, x = make(causal=True).bfloat16(), tokens(256).bfloat16()
    m.wa.weight.data.zero_()
    state = m.initial_state(2)
    with torch.no_grad():
        for piece in x.split(1, 1):
            y, state = m(piece, state=state)
        wide = m.double()(x.double())[:, -1:]
    assert (y.double() - wide).abs().max() < 0.02 * wide.abs().max() + 0.02


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(act="relu"), "act must be one of clip, sigmoid"),
        (dict(scope="row"), "scope must be one of"),
        (dict(count="all"), "count must be one of"),
        (dict(rate=1.5), "rate must lie in"),
    ],
)
def test_errors_name_what_is_wrong(keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**keywords)


def test_counting_the_keys_of_a_call_cannot_stream() -> None:
    with pytest.raises(ValueError, match="streaming needs count='visible'"):
        make(causal=True, count="keys").initial_state(2)
