"""The file of counted FLOPs is complete and true."""

import pytest

from attnlab import cards
from attnlab.models.flops import count, counted, named_backbones

# The smallest size of each backbone: the larger ones have the same blocks.
SMALLEST = sorted(
    min(entry.card.sizes, key=lambda name: (entry.card.sizes[name].params, name))
    for entry in cards.entries()
    if entry.card.kind is cards.BACKBONE and entry.card.sizes
)


def test_every_named_size_of_every_backbone_is_counted():
    assert set(named_backbones()) == set(counted())


@pytest.mark.parametrize("name", SMALLEST)
def test_counted_again_the_number_is_the_same(name):
    assert count(name) == counted()[name]


@pytest.mark.parametrize(
    ("name", "gigas", "source"),
    [
        ("deit_small_patch16_224", 4.6, "arXiv 2012.12877, table 5"),
        ("focalnet_tiny_srf", 4.4, "arXiv 2203.11926, table 1"),
        ("eca_resnet50", 4.1, "arXiv 1910.03151, table 2, with the classifier"),
    ],
)
def test_multiply_adds_are_the_papers(name, gigas, source):
    assert counted()[name].flops / 2e9 == pytest.approx(gigas, abs=0.05), source
