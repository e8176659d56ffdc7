"""Small models that the tests of a session train once, in which a known circuit has formed."""

import pytest

from attnlab.lens.toys import induction, permutations, recall


@pytest.fixture(scope="session")
def recalling():
    """Key-value recall with 8 heads in each of two layers; those of the second are retrieval heads."""
    return recall.train(heads=8)


@pytest.fixture(scope="session")
def inducing():
    """A text told twice: the heads of the second layer are induction heads."""
    return induction.train()


@pytest.fixture(scope="session")
def permuting():
    """One of eight permutations, told by examples."""
    return permutations.train()
