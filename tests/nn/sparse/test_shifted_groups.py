"""Shifted groups: the paper's steps one by one, what they leave unseen, and what the released code lets leak."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.shifted_groups import ShiftedGroups
from attnlab.patterns import Causal
from attnlab.positions import ALiBi, Rotary

DIM = 16


def make(**keywords) -> ShiftedGroups:
    torch.manual_seed(0)
    return ShiftedGroups(DIM, **{"heads": 4, "group": 8, "sinks": 2, **keywords}).double().eval()


def plain(m: ShiftedGroups) -> MultiHead:
    other = MultiHead(DIM, heads=m.heads, kv_heads=m.kv_heads, causal=True, position=m.position).double().eval()
    other.load_state_dict(m.state_dict())
    return other


def tokens(n: int = 32) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


def rolled(m: ShiftedGroups, x: Tensor) -> Tensor:
    """The steps of the paper: roll the moved heads, mask by where each rolled token comes from, roll back."""
    q, k, v = (t.repeat_interleave(m.heads // t.shape[1], 1) for t in m.project(x))
    n, moved = x.shape[1], int(m.heads * m.moved)
    g = m.size(n)
    out = torch.zeros_like(q)
    for h in range(m.heads):
        by = g // 2 if h >= m.heads - moved else 0
        came = torch.arange(n).roll(-by)  # the true position of each place
        for start in range(0, n, g):
            group = came[start : start + g].tolist()
            for place, i in enumerate(group):
                if m.variant == "release":
                    seen = group[: place + 1]
                else:
                    # Without a wrap, the group in which the ends of the text meet is two.
                    apart = by > 0 and 0 in group and not m.wrap
                    same = [j for j in group if j <= i and not (apart and (j < by) != (i < by))]
                    seen = sorted({*same, *range(min(m.sinks, i + 1))})
                weights = (q[:, h, i : i + 1] @ k[:, h, seen].mT / q.shape[-1] ** 0.5).softmax(-1)
                out[:, h, i] = (weights @ v[:, h, seen]).squeeze(1)
    return m.merge(out)


@pytest.mark.parametrize("options", [
    {},
    {"moved": 0.5, "sinks": 0},
    {"wrap": True},
    {"wrap": True, "group": 0.25, "position": Rotary(4)},
    {"wrap": True, "sinks": 0, "moved": 0.5, "variant": "release"},
    {"moved": 1.0},
    {"moved": 0.0},
    {"kv_heads": 2, "moved": 0.5},
    {"kv_heads": 1},
    {"group": 32},
    {"group": 32, "wrap": True},
])  # fmt: skip
def test_it_is_the_papers_steps_one_by_one(options) -> None:
    m, x = make(**options), tokens()
    torch.testing.assert_close(m(x), rolled(m, x))


@pytest.mark.parametrize("wrap", [False, True])
def test_its_pattern_says_what_the_folded_form_computes(wrap: bool) -> None:
    m, x = make(wrap=wrap, heads=1, moved=1.0), tokens(24)
    torch.testing.assert_close(m(x), plain(m)(x, pattern=m.pattern(8, 4, 24 if wrap else None)))
    assert torch.equal(m.weights(x)[0, 0] > 0, m.pattern(8, 4, 24 if wrap else None).matrix(24))


def test_groups_as_long_as_the_text_are_causal_attention() -> None:
    m, x = make(group=64), tokens()
    torch.testing.assert_close(m(x), plain(m)(x))
    unmoved = make(group=32, moved=0.0)
    torch.testing.assert_close(unmoved(x), plain(unmoved)(x))


def changed(m: ShiftedGroups, at: int) -> list[int]:
    """The tokens whose outputs depend on token `at`."""
    x = tokens()[:1]
    other = x.clone()
    other[:, at] += 1.0
    return (m(other) != m(x)).any(-1)[0].nonzero().flatten().tolist()


def test_a_token_changes_its_own_group_and_a_sink_changes_all() -> None:
    assert changed(make(moved=0.0), 17) == list(range(17, 24))
    assert changed(make(moved=1.0), 17) == list(range(17, 20))
    assert changed(make(), 17) == list(range(17, 24)) and changed(make(), 21) == list(range(21, 28))
    assert changed(make(), 0) == changed(make(moved=1.0, wrap=True), 0) == list(range(32))
    assert changed(make(sinks=0), 0) == list(range(8))


def test_only_the_released_order_lets_early_tokens_see_late_ones() -> None:
    leaking = make(wrap=True, sinks=0, moved=0.5, variant="release")
    assert min(changed(leaking, 29)) == 0
    for variant in (dict(wrap=True), {}):
        assert min(changed(make(**variant), 29)) == 29


@pytest.mark.parametrize("pieces", [[1] * 45, [3, 1, 20, 1, 20], [45]], ids=["single", "mixed", "whole"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_pieces_give_what_the_whole_gives(pieces: list[int], kv_heads: int) -> None:
    m, x = make(position=Rotary(4), kv_heads=kv_heads), tokens(45)
    state, out = m.initial_state(2), []
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            y, state = m(piece, state=state)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), m(x), rtol=1e-9, atol=1e-9)


def test_no_token_is_computed_beyond_its_group() -> None:
    seen = []
    original = F.scaled_dot_product_attention

    def count(q: Tensor, k: Tensor, v: Tensor, **keywords):
        seen.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return original(q, k, v, **keywords)

    m, x = make(sinks=0), tokens(64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", count)
        m(x)
    assert sum(seen) <= 2 * 4 * 64 * 8  # batch, heads, queries, keys of a group


@pytest.mark.parametrize(("wrong", "message"), [
    (lambda: make(group=7), "group must be even and at least 2, got 7"),
    (lambda: make(group=1.5), "a share in"),
    (lambda: make(moved=2.0), "moved must be a share in"),
    (lambda: make(sinks=5), "sinks must be 0 to half a group, got 5"),
    (lambda: make(variant="code"), "variant must be 'paper' or 'release', got 'code'"),
    (lambda: make(variant="release"), "variant='release' needs wrap=True"),
    (lambda: make(causal=False), "causal must be True"),
    (lambda: make(wrap=True)(tokens(12)), "x must hold whole groups of 8 where they wrap, got 12 tokens"),
    (lambda: make(group=0.25)(tokens(12)), "group must give an even number of at least 4 tokens, got 3 of 12"),
    (lambda: make(group=0.25).initial_state(1), "streaming needs wrap=False and group in tokens"),
    (lambda: make(wrap=True).initial_state(1), "streaming needs wrap=False and group in tokens"),
    (lambda: make(position=ALiBi(4))(tokens()), "position must turn queries and keys, got ALiBi"),
    (lambda: make()(tokens(), pattern=Causal()), "takes no pattern"),
    (lambda: make()(tokens(), tokens()), "takes no context"),
])  # fmt: skip
def test_errors_name_what_is_wrong(wrong, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
