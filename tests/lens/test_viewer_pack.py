"""What a page of attention keeps of the matrices."""

import pytest
import torch

from attnlab.lens.viewer.pack import Places, layouts, pack, unpack


def attention(*shape, sharp=3.0):
    return torch.randn(*shape).mul(sharp).softmax(-1)


@pytest.mark.parametrize("sharp", [0.1, 1, 10])
def test_a_small_matrix_is_kept_to_eight_bits(sharp):
    places = Places(50, (7, 7), 1)
    (layout,) = layouts([(3, places, places)])
    weights = attention(3, 50, 50, sharp=sharp)
    packed, kept = pack(weights, layout)
    assert layout.whole and kept == 1
    # Half a step of √w in 255ths, and half a step of the row's scale in 2048ths of an octave.
    largest = weights.amax(-1, keepdim=True)
    bound = (weights * largest).sqrt() / 255 + 2e-4 * weights + largest / 255**2
    assert ((unpack(packed, layout) - weights).abs() <= bound).all()


def test_what_is_zero_stays_zero_and_a_blind_row_is_blind():
    weights = attention(2, 9, 9).tril()
    weights[:, 4] = 0
    (layout,) = layouts([(2, Places(9), Places(9))])
    back = unpack(pack(weights, layout)[0], layout)
    assert (back[weights == 0] == 0).all() and (back[weights > 1e-3] > 0).all()


@pytest.mark.parametrize("places", [Places(65, (8, 8), 1), Places(70), Places(90, (8, 8), 5)])
def test_a_large_matrix_keeps_its_strongest_keys_and_means_of_the_rest(places):
    n = places.count
    weights = attention(4, n, n)
    (layout,) = layouts([(4, places, places)], budget=4 * n * 40)
    assert not layout.whole and layout.query_width == 1
    packed, kept = pack(weights, layout)
    back = unpack(packed, layout)
    strongest, at = weights.topk(layout.top)
    torch.testing.assert_close(back.gather(-1, at), strongest, rtol=0.02, atol=0.01)
    assert kept == pytest.approx(float(strongest.sum() / weights.sum()), abs=1e-4)
    rest = torch.ones_like(weights).scatter(-1, at, 0)
    groups = torch.tensor(layout.keys.groups(layout.key_width))
    for group in range(int(groups.max()) + 1):
        here = rest * (groups == group)
        mean = (weights * here).sum(-1) / here.sum(-1).clamp_min(1)
        shown = (back * here).sum(-1) / here.sum(-1).clamp_min(1)
        torch.testing.assert_close(shown, torch.where(here.sum(-1) > 0, mean, 0.0), rtol=0.05, atol=2e-3)


def test_groups_are_tiles_of_patches_with_class_tokens_apart():
    assert Places(1 + 12, (3, 4), 1).groups(2) == [0, 1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 4, 4]
    assert Places(5).groups(2) == [0, 0, 1, 1, 2]
    for places in (Places(577, (24, 24), 1), Places(90, (8, 7), 5), Places(31)):
        assert all(len(set(places.groups(w))) == places.count_groups(w) for w in range(1, 9))


def test_twenty_four_layers_fit_the_budget_and_what_cannot_is_refused():
    places = Places(577, (24, 24), 1)
    assert sum(x.bytes for x in layouts([(16, places, places)] * 24)) <= 13_500_000
    assert all(x.query_width == 1 for x in layouts([(16, places, places)] * 24))  # every patch has a row of its own
    with pytest.raises(ValueError, match="choose fewer layers, heads or tokens"):
        layouts([(64, Places(100_000), Places(100_000))] * 80)
