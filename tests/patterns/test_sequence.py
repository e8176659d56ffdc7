"""Patterns on a sequence: each is its sentence; they combine like sets, shift for decoding, refuse what misfits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.patterns import (
    And,
    Causal,
    Dilated,
    Documents,
    Explicit,
    Full,
    Groups,
    Not,
    Or,
    Pattern,
    PowersOfTwo,
    Prefix,
    Regions,
    Sinks,
    Window,
)

N = 37
# What each pattern says, in plain integers: may query i see key j?
SAID = {
    Full(): lambda i, j: True,
    Causal(): lambda i, j: j <= i,
    Window(5): lambda i, j: i - 5 < j <= i,
    Window(5, causal=False): lambda i, j: abs(i - j) < 5,
    Dilated(3): lambda i, j: j <= i and (i - j) % 3 == 0,
    Dilated(3, size=4): lambda i, j: 0 <= i - j < 12 and (i - j) % 3 == 0,
    Dilated(4, size=2, causal=False): lambda i, j: abs(i - j) < 8 and (i - j) % 4 == 0,
    Sinks(3): lambda i, j: j < 3,
    Prefix(6): lambda i, j: j <= i or j < 6,
    PowersOfTwo(block=1, window=1, sinks=0): lambda i, j: i == j or (j < i and math.log2(i - j).is_integer()),
    PowersOfTwo(block=4, window=3, sinks=2): lambda i, j: (
        j <= i and (i // 4 - j // 4 in (0, 1, 2, 4, 8) or j // 4 < 2)
    ),
    Documents((10, 1, 26)): lambda i, j: (i < 10) == (j < 10) and (i < 11) == (j < 11),
    Groups(6): lambda i, j: i // 6 == j // 6,
    Groups(6, shift=3): lambda i, j: (i + 3) // 6 == (j + 3) // 6,
    Regions(torch.arange(N) % 5): lambda i, j: i % 5 == j % 5,
}  # fmt: skip
NAMES = {str(p): p for p in SAID}


@pytest.mark.parametrize("name", NAMES)
def test_each_pattern_is_its_sentence(name):
    pattern = NAMES[name]
    said = torch.tensor([[SAID[pattern](i, j) for j in range(N)] for i in range(N)])
    assert torch.equal(pattern.matrix(N), said)
    assert pattern.density(N) == pytest.approx(said.double().mean().item())


def test_in_a_ring_the_first_group_goes_on_with_the_last_tokens():
    seen = Groups(4, shift=2, ring=12).matrix(12)
    assert seen[0].nonzero().flatten().tolist() == [0, 1, 10, 11] == seen[11].nonzero().flatten().tolist()
    assert torch.equal(seen[2:10, 2:10], Groups(4).matrix(8))


@pytest.mark.parametrize("name", NAMES)
def test_keys_named_for_a_tile_hold_all_that_it_sees(name):
    pattern = NAMES[name]
    tiles = pattern.query_tiles(N)
    if tiles is None:
        tiles = torch.arange(40).where(torch.arange(40) < N, -1).view(-1, 8)
    assert sorted(tiles[tiles >= 0].tolist()) == list(range(N))
    # The places that fill up a tile repeat a query of it.
    tiles = torch.where(tiles >= 0, tiles, tiles.amax(1, keepdim=True))
    keys = pattern.tile_keys(tiles, N)
    if keys is None:
        return
    matrix = pattern.matrix(N)
    for queries, listed in zip(tiles, keys, strict=True):
        listed = listed[listed >= 0].tolist()
        assert listed == sorted(set(listed))
        assert set(matrix[queries].any(0).nonzero()[:, 0].tolist()) <= set(listed)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(("Documents", "Regions"))])
def test_a_shifted_pattern_is_the_rows_from_there_on(name):
    pattern = NAMES[name]
    assert torch.equal(pattern.starting_at(20).matrix(N - 20, N), pattern.matrix(N)[20:])
    assert pattern.starting_at(0) is pattern
    assert torch.equal(pattern.starting_at(5).starting_at(15).matrix(N - 20, N), pattern.matrix(N)[20:])


def test_causal_and_window_stand_at_the_top_left_for_other_lengths():
    assert Causal().matrix(2, 4).tolist() == [[True, False, False, False], [True, True, False, False]]
    assert Window(2).matrix(4, 2).tolist() == [[True, False], [True, True], [False, True], [False, False]]


simple = st.sampled_from(list(NAMES.values()))


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        simple, lambda inner: st.builds(And, inner, inner) | st.builds(Or, inner, inner) | st.builds(Not, inner)
    )
)
def test_patterns_combine_like_sets(pattern):
    def said(p: Pattern) -> torch.Tensor:
        match p:
            case And():
                return said(p.left) & said(p.right)
            case Or():
                return said(p.left) | said(p.right)
            case Not():
                return ~said(p.pattern)
        return p.matrix(N)

    assert torch.equal(pattern.matrix(N), said(pattern))
    assert torch.equal((pattern & Causal()).matrix(N), said(pattern) & Causal().matrix(N))
    keys = pattern.tile_keys(torch.arange(N)[:, None], N)
    if keys is not None:
        named = torch.zeros(N, N + 1, dtype=torch.bool).scatter_(1, torch.where(keys >= 0, keys, N), True)[:, :N]
        assert not bool((said(pattern) & ~named).any())


def test_operators_build_the_same_as_the_classes_and_equal_patterns_are_one_key():
    made = Window(512) | (Sinks(4) & Causal())
    assert made == Or(Window(512), And(Sinks(4), Causal())) and hash(made) == hash(Window(512) | (Sinks(4) & Causal()))
    assert made != Window(511) | (Sinks(4) & Causal()) and ~Window(3) == Not(Window(3))
    assert str(made) == "(Window(size=512, causal=True) | (Sinks(count=4) & Causal()))"
    mask = torch.rand(5, 5) < 0.5
    assert Explicit(mask) == Explicit(mask.clone()) and Explicit(mask) != Explicit(~mask)
    with pytest.raises(TypeError):
        Window(3) & 3


def test_information_travels_as_far_as_layers_of_the_pattern_carry_it():
    # A window of w reaches depth · (w − 1) back.
    reach = Window(4).reach(3, 40)
    assert [int(reach[i].nonzero()[0]) for i in (39, 20, 5)] == [30, 11, 0]
    # Steps of powers of two reach distance d in as many layers as d has ones in binary (arXiv 2503.03588).
    power = PowersOfTwo(block=1, window=1, sinks=0)
    for depth in (1, 2, 3):
        wanted = [bin(i).count("1") <= depth for i in range(64)]
        assert power.reach(depth, 64)[:, 0].tolist() == wanted
    assert torch.equal(Window(2).reach(0, 5), torch.eye(5, dtype=torch.bool))
    assert power.reach(6, 64)[:, 0].all() and not Documents((32, 32)).reach(9, 64)[:, 0][32:].any()


def test_the_strided_half_of_a_sparse_transformer_and_a_window_reach_all_in_two_layers():
    # arXiv 1904.10509: √n local keys and every √n-th one.
    assert torch.equal((Window(8) | Dilated(8)).reach(2, 64), Causal().matrix(64))


def test_a_mask_for_each_batch_entry_and_head_is_kept_apart():
    mask = torch.rand(2, 3, 6, 6) < 0.5
    pattern = Explicit(mask) & Causal()
    assert pattern.per_batch and pattern.per_head
    assert torch.equal(pattern.matrix(6, batch=2, heads=3), mask & Causal().matrix(6))
    for b in range(2):
        for h in range(3):
            one = pattern.at(b, h)
            assert not (one.per_batch or one.per_head) and torch.equal(one.matrix(6), mask[b, h] & Causal().matrix(6))
    assert Window(3).at(1, 2) is not None and torch.equal(Window(3).at(1, 2).matrix(6), Window(3).matrix(6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(0), "Window: size must be an integer of at least 1, got 0"),
        (lambda: Window(2.5), "Window: size must be an integer"),
        (lambda: Window(True), "Window: size must be an integer"),
        (lambda: Dilated(0), "Dilated: step must be an integer"),
        (lambda: Dilated(2, size=0), "Dilated: size must be an integer"),
        (lambda: PowersOfTwo(block=0), "PowersOfTwo: block must be"),
        (lambda: PowersOfTwo(sinks=-1), "PowersOfTwo: sinks must be 0 or more, got -1"),
        (lambda: Sinks(0), "Sinks: count must be"),
        (lambda: Prefix(0), "Prefix: count must be"),
        (lambda: Groups(0), "Groups: size must be an integer of at least 1"),
        (lambda: Groups(4, shift=4), "Groups: shift must be in"),
        (lambda: Groups(4, ring=6), "Groups: ring must be a multiple of size = 4, got 6"),
        (lambda: Groups(4, ring=8).matrix(12), "ring of 8 tokens does not fit 12 queries and 12 keys"),
        (lambda: Documents(()), "Documents: lengths must be one or more positive integers"),
        (lambda: Documents((3, 0)), "Documents: lengths must be one or more positive integers"),
        (lambda: Documents((3, 4)).matrix(8), "lengths sum to 7, but there are 8 queries and 8 keys"),
        (lambda: Causal().starting_at(-1), "offset must be 0 or more, got -1"),
        (lambda: Explicit(torch.ones(3, 3)), "Explicit: mask must be bool"),
        (lambda: Explicit(torch.ones(3, 3) > 0).matrix(4), "does not fit 4 queries and 4 keys"),
        (lambda: (Explicit(torch.ones(3, 3) > 0) | Causal()).matrix(4), "does not fit 4 queries"),
        (lambda: (~Documents((3,))).matrix(4), "lengths sum to 3"),
        (lambda: Regions(torch.ones(3)), "Regions: labels must be integers"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
