"""Attention of complex vectors: its factors equal the pairwise definition, and its limits are what they must be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from attnlab.nn.multihead import MultiHead
from attnlab.nn.softmax.complex import ComplexAttention
from attnlab.positions import Rotary

DIM, HEADS = 16, 2


def make(*, shake: bool = True, **keywords) -> ComplexAttention:
    torch.manual_seed(0)
    m = ComplexAttention(DIM, heads=HEADS, **keywords).double().eval()
    if shake:
        with torch.no_grad():
            for p in m.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return m


def tokens(n: int = 6) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


def by_hand(m: ComplexAttention, x: Tensor, context: Tensor | None = None) -> Tensor:
    """One pair of tokens, one head and one component at a time."""
    context = x if context is None else context
    d, rope = m.head_dim, [10000 ** (-2 * c / m.head_dim) for c in range(m.head_dim // 2)]
    wq, wk, wv = m.wqkv.weight.chunk(3)
    out = []
    for b in range(len(x)):
        heads = []
        for h in range(HEADS):
            mine = slice(h * d, (h + 1) * d)
            q, k, v = x[b] @ wq[mine].T, context[b] @ wk[mine].T, context[b] @ wv[mine].T
            rows = []
            for i in range(len(q)):
                scores = []
                for j in range(i + 1 if m.causal else len(k)):
                    score = 0.0
                    for c in range(d // 2):
                        re, im = (2 * c, 2 * c + 1) if m.layout == "interleaved" else (c, c + d // 2)
                        angles = [math.atan2(t[im].item(), t[re].item()) for t in (q[i], k[j])]
                        size = math.hypot(q[i, re], q[i, im]) * math.hypot(k[j, re], k[j, im])
                        difference = angles[0] - angles[1]
                        if m.adapt == "mlp":
                            difference = (difference + math.pi) % (2 * math.pi) - math.pi
                            inner = nn.functional.gelu(difference * m.mlp_in[0, h] + m.mlp_in[1, h])
                            difference = difference + (inner @ m.mlp_out[h] + m.mlp_shift[h]).item()
                        else:
                            at = 0 if m.adapt == "head" else c
                            shift = 0.0 if m.angle_shift is None else m.angle_shift[h, 0, at].item()
                            difference = m.angle_scale[h, 0, at].item() * difference + shift
                        turn = rope[c]
                        if m.delta == "learned":
                            turn = m.frequency[h, c].item()
                        elif m.delta == "scaled":
                            turn *= math.exp(m.frequency_log[h, 0].item())
                        score += size * math.cos(difference + (i - j) * turn)
                    scores.append(score / math.sqrt(d))
                rows.append(torch.tensor(scores, dtype=torch.float64).softmax(0) @ v[: len(scores)])
            heads.append(torch.stack(rows))
        out.append(torch.cat(heads, -1) @ m.wo.weight.T)
    return torch.stack(out)


CHOICES = [
    dict(adapt="affine"),
    dict(adapt="scale", delta="fixed", layout="half"),
    dict(adapt="head", delta="scaled"),
    dict(adapt="mlp", layout="half"),
]


@pytest.mark.parametrize("choice", CHOICES)
@torch.no_grad()
def test_equals_the_pairwise_definition(choice: dict) -> None:
    x = tokens(5)
    for causal in (True, False):
        m = make(causal=causal, **choice)
        torch.testing.assert_close(m(x), by_hand(m, x), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(m(x, context := tokens(3)), by_hand(m, x, context), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("adapt", ["affine", "scale", "head", "mlp"])
@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_begins_as_rotary_attention(adapt: str, layout: str) -> None:
    m, x = make(shake=False, adapt=adapt, layout=layout, delta="fixed", causal=True), tokens(40)
    rope = Rotary(m.head_dim, interleaved=layout == "interleaved")
    rotary = MultiHead(DIM, heads=HEADS, causal=True, position=rope).double()
    rotary.load_state_dict({n: p for n, p in m.state_dict().items() if n.split(".")[0] in ("wqkv", "wo")})
    torch.testing.assert_close(m(x), rotary(x), rtol=1e-7, atol=1e-9)
    for delta in ("learned", "scaled"):
        other = make(shake=False, adapt=adapt, layout=layout, delta=delta, causal=True)
        torch.testing.assert_close(other(x), rotary(x), rtol=1e-5, atol=1e-5)


def test_without_frequencies_it_is_attention_without_places() -> None:
    m, x = make(shake=False), tokens()
    nn.init.zeros_(m.frequency)
    order = torch.randperm(6)
    torch.testing.assert_close(m(x[:, order]), m(x)[:, order])


@pytest.mark.parametrize("choice", CHOICES)
def test_scores_depend_on_the_distance_alone(choice: dict) -> None:
    m, x = make(**choice), tokens()
    q, k, _ = m.qkv(x)
    out = []
    for offset in (0, 1000):
        if m.adapt == "mlp":
            # One query at `offset` and one key at 0, against the same distance made of other places.
            out.append(m.pair_scores(q[:, :, :1], k[:, :, 3:4], 0)[..., 0] if offset == 0 else
                       m.pair_scores(q[:, :, :1], k[:, :, 3:4].expand(-1, -1, 6, -1), 5)[..., 5])  # fmt: skip
        else:
            q_turned, k_turned, _ = m.project(x, None, offset)
            out.append(q_turned @ k_turned.mT)
    torch.testing.assert_close(out[0], out[1])


def test_far_places_keep_their_precision_in_float32() -> None:
    m = make().float()
    exact = torch.arange(100_000, 100_064, dtype=torch.float64)[:, None] * m.frequency.detach().double()[:, None]
    found = m.places(100_000, 64, torch.device("cpu")).float()
    torch.testing.assert_close(found.cos().double(), exact.cos(), rtol=0, atol=1e-6)


def test_vectors_of_zero_and_of_nearly_zero_have_finite_gradients() -> None:
    for dtype in (torch.float32, torch.float64):
        m = make().to(dtype)
        for size in (0.0, 1e-30, 1e-18, 1e-8):
            x = torch.full((1, 4, DIM), size, dtype=dtype, requires_grad=True)
            q, k, _ = m.project(x)
            (q @ k.mT).sum().backward()
            assert x.grad is not None and bool(x.grad.isfinite().all()), (dtype, size)


def test_costs_three_numbers_per_head_and_component() -> None:
    plain = sum(p.numel() for p in MultiHead(DIM, heads=HEADS).parameters())
    assert sum(p.numel() for p in make().parameters()) - plain == 3 * HEADS * (DIM // HEADS // 2)


@pytest.mark.parametrize("choice", CHOICES)
def test_pieces_give_what_the_whole_gives(choice: dict) -> None:
    m, x = make(causal=True, **choice), tokens(8)
    state, out = m.initial_state(2), []
    with torch.no_grad():
        for piece in x.split([3, 1, 1, 3], 1):
            y, state = m(piece, state=state)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), m(x))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(adapt="angle"), "adapt must be one of"),
        (dict(delta="none"), "delta must be one of"),
        (dict(layout="paired"), "layout must be one of"),
        (dict(head_dim=3), "head_dim must be even"),
        (dict(kv_heads=1), "kv_heads must be heads = 2"),
        (dict(base=0.0), "base must be positive"),
    ],
)
def test_errors_name_what_is_wrong(keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**keywords)
