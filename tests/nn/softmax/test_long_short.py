"""Long-short heads: equal to masks head by head, to plain attention in the limits, and bounded in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab.attend import attend
from attnlab.nn.multihead import MultiHead
from attnlab.nn.softmax.long_short import LongShortAttention
from attnlab.patterns import Causal, Window
from attnlab.positions import ALiBi, Rotary

DIM, HEADS = 24, 4


def make(**keywords) -> LongShortAttention:
    torch.manual_seed(0)
    return LongShortAttention(DIM, **{"heads": HEADS, "span": 3, "causal": True, **keywords}).double().eval()


def plain(m: LongShortAttention) -> MultiHead:
    other = MultiHead(DIM, heads=HEADS, causal=m.causal, position=m.position).double().eval()
    other.load_state_dict(m.state_dict())
    return other


def tokens(n: int = 11) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


def by_hand(m: LongShortAttention, x: Tensor, spans: list[int | None]) -> Tensor:
    """Each head with its own additive mask, by the definition."""
    q, k, v = (t.view(2, len(x[0]), HEADS, -1) for t in m.wqkv(x).chunk(3, -1))
    heads = []
    for h, span in enumerate(spans):
        distance = torch.arange(len(x[0]))[:, None] - torch.arange(len(x[0]))
        seen = distance >= 0 if m.causal else torch.ones_like(distance).bool()
        if span is not None:
            seen = seen & (distance.abs() < span)
        scores = q[:, :, h] @ k[:, :, h].mT / q.shape[-1] ** 0.5
        heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, :, h])
    return m.wo(torch.cat(heads, -1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("order", ["local_first", "global_first"])
def test_equals_a_mask_per_head(order: str, causal: bool) -> None:
    m, x = make(order=order, spans=[3, 3, 5], causal=causal), tokens()
    spans = [3, 3, 5, None] if order == "local_first" else [None, 3, 3, 5]
    torch.testing.assert_close(m(x), by_hand(m, x, spans))


@pytest.mark.parametrize("keywords", [dict(span=11), dict(global_heads=HEADS)])
def test_is_plain_attention_where_windows_are_wide_or_there_are_none(keywords: dict) -> None:
    m, x = make(**keywords), tokens()
    torch.testing.assert_close(m(x), plain(m)(x))


def test_without_global_heads_it_sees_layers_times_span_minus_one() -> None:
    m, x = make(global_heads=0), tokens().requires_grad_()
    torch.testing.assert_close(m(x), plain(m)(x, pattern=Window(3)))
    y = x
    for _ in range(3):
        y = y + m(y)
    (gradient,) = torch.autograd.grad(y[:, -1].sum(), x)
    assert gradient.abs().sum((0, 2)).ne(0).tolist() == [False] * 4 + [True] * (3 * (3 - 1) + 1)


def test_has_the_parameters_of_plain_attention() -> None:
    assert sum(p.numel() for p in make().parameters()) == 4 * DIM**2


def test_global_heads_may_share_keys_and_values() -> None:
    m, x = make(global_heads=2, shared_global_kv=True), tokens()
    q, k, v = m.project(x)
    assert k.shape[1] == v.shape[1] == 3
    local = attend(q[:, :2], k[:, :2], v[:, :2], pattern=Window(3))
    everywhere = attend(q[:, 2:], k[:, 2:], v[:, 2:], pattern=Causal())
    torch.testing.assert_close(m(x), m.merge(torch.cat((local, everywhere), 1)))


@pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 6], [2, 2, 2, 5]])
def test_decodes_in_pieces_with_only_a_span_of_keys_for_local_heads(pieces: list[int]) -> None:
    m, x = make(position=Rotary(DIM // HEADS)), tokens()
    state, out = m.initial_state(2), []
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            y, state = m(piece, state=state)
            out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), m(x))
    local, everywhere = state.caches
    assert local.bytes() == 2 * 2 * (HEADS - 1) * 3 * (DIM // HEADS) * 8
    assert everywhere.length == 11


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        (dict(global_heads=5), "global_heads"),
        (dict(spans=[3]), "spans"),
        (dict(spans=[3, 0, 3]), "spans"),
        (dict(order="random"), "order"),
        (dict(kv_heads=2), "kv_heads"),
        (dict(position=ALiBi(HEADS)), "position"),
    ],
)
def test_bad_arguments_are_named(keywords: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make(**keywords)


def copy_the_last_two(kind: type[MultiHead], *, length: int = 128, letters: int = 4, **keywords) -> tuple[float, float]:
    """Largest |logit| and accuracy of one layer that learnt to tell each letter and the one before it."""
    torch.manual_seed(0)
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, 32, 2) / 32)
    places = torch.cat((angles.sin(), angles.cos()), 1)
    mixer = kind(32, heads=4, causal=True, **keywords)
    embed, norm, head = torch.nn.Embedding(letters, 32), torch.nn.LayerNorm(32), torch.nn.Linear(32, letters**2)
    parts = torch.nn.ModuleList((embed, head, mixer))
    optimizer = torch.optim.AdamW(parts.parameters(), lr=1e-2)
    for _ in range(150):
        ids = torch.randint(letters, (8, length))
        wanted = (ids * letters + ids.roll(1, 1))[:, 1:]
        x = norm(embed(ids) + places)
        y = head(x + mixer(x))[:, 1:]
        loss = torch.nn.functional.cross_entropy(y.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        q, k, _ = mixer.project(x)
        logits = (q @ k.mT).abs() * mixer.head_dim**-0.5
        distance = torch.arange(length)[:, None] - torch.arange(length)
        groups = mixer.groups if isinstance(mixer, LongShortAttention) else [(slice(None), slice(None), None)]
        seen = [logits[:, h].masked_fill((distance < 0) | (distance >= (span or length)), 0) for h, _, span in groups]
        return max(s.max().item() for s in seen), (y.argmax(-1) == wanted).float().mean().item()


def test_what_is_near_is_learnt_with_smaller_logits_than_full_attention_needs() -> None:
    """The paper's claim, on a pattern that is two tokens wide."""
    full, learnt_full = copy_the_last_two(MultiHead)
    short, learnt_short = copy_the_last_two(LongShortAttention, span=4)
    assert short < 0.7 * full
    assert learnt_short > 0.99 > 0.8 > learnt_full
