"""Every claim of every registered card, checked automatically."""

from __future__ import annotations

import pytest

from attnlab.cards import BACKBONE, DENOISER, FEATURES, LM, TOKENS, entries
from conformance import networks
from conformance.claims import Subject, claims_of

MECHANISMS = [(e, check) for e in entries() if e.card.kind in (TOKENS, FEATURES) for check in claims_of(e.card)]
KINDS = (BACKBONE, LM, DENOISER)
NETWORKS = [(e, check) for e in entries() if e.card.kind in KINDS for check in networks.CHECKS]


@pytest.mark.parametrize(("entry", "check"), MECHANISMS, ids=[f"{e.card.name}-{c.__name__}" for e, c in MECHANISMS])
def test_mechanism(entry, check) -> None:
    check(Subject(entry.card, entry.target))


@pytest.mark.parametrize(("entry", "check"), NETWORKS, ids=[f"{e.card.name}-{c.__name__}" for e, c in NETWORKS])
def test_network(entry, check) -> None:
    check(networks.Network(entry.card, entry.target))


@pytest.mark.parametrize("entry", entries(), ids=lambda e: e.card.name)
def test_card_says_where_it_comes_from(entry) -> None:
    card = entry.card
    assert card.title and card.family
    assert card.paper.replace(".", "").isdigit() or card.paper == "", f"not an arXiv id: {card.paper}"
    assert card.paper in (entry.target.__doc__ or ""), "the docstring does not name its source"
    if card.kind in (TOKENS, FEATURES):
        assert card.cost, "the card gives no cost"
