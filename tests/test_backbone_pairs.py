"""The benchmark of image backbones: which networks it compares, and what its table says."""

import sys
from pathlib import Path

import pytest

import attnlab
from attnlab.cards import BACKBONE

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    if not BENCHMARKS.exists():
        pytest.skip("the benchmarks are not part of the package")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import backbones

        return backbones
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_every_image_backbone_has_a_peer_or_a_reason(script):
    cards = [attnlab.describe(name) for name in attnlab.names(kind=BACKBONE)]
    sizes = {size for card in cards for size in card.sizes}
    assert set(script.PAIRS) <= sizes | {card.name for card in cards}
    lacking = [c.name for c in cards if not {c.name, *c.sizes} & {*script.PAIRS, *script.WITHOUT_PEER}]
    assert not lacking


def test_a_ratio_above_one_means_that_ours_is_faster(script):
    row = dict(
        name="volo_d1", kind="timm", repository="", work="inference", image=224, batch=1, ours=50.0, theirs=100.0,
        off=1e-7, note="",
    )  # fmt: skip
    assert "| volo_d1 | timm | 224² | 1 | 50 | 100 | 2.00× | 1e-07 |" in script.table([row], {})
    assert script.means([row])[0] == "inference, timm: geometric mean 2.00×, least 2.00×, 0 of 1 rows below 1"


def test_calls_take_turns_and_the_first_round_does_not_count(script):
    now, order = [0.0], []

    def call(name, seconds):
        def run():
            now[0] += 100.0 if order.count(name) == 0 else seconds
            order.append(name)

        return run

    assert script.in_turns([call("a", 1.0), call("b", 2.0)], 0.0, lambda: now[0]) == [1000.0, 2000.0]
    assert "".join(order) == "baabba"
