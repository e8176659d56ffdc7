"""Attention as a graph: the series and its closed form, visits counted by walking, the dominant eigenvector."""

import pytest
import torch

from attnlab.lens.centrality import dominant, expected_visits, katz, walks
from attnlab.nn.linear.infinite import centrality

D = torch.float64


def affinities(n: int = 6) -> torch.Tensor:
    a = torch.rand(n, n, dtype=D)
    return a / a.norm()


def moons(n: int = 40) -> torch.Tensor:
    """Affinities among points on two half circles."""
    from sklearn.datasets import make_moons

    points = torch.tensor(make_moons(n, noise=0.05, random_state=0)[0])
    a = torch.exp(-torch.cdist(points, points).square() / 0.1)
    return a / a.norm()


def test_the_series_ends_at_the_closed_form():
    a = affinities()
    by_hand, power = torch.zeros_like(a), torch.eye(6, dtype=D)
    for _ in range(300):
        power = 0.9 * power @ a
        by_hand += power
    torch.testing.assert_close(walks(a, 0.9), by_hand)
    torch.testing.assert_close(walks(a, 0.9, hops=300), by_hand)
    torch.testing.assert_close(walks(a, 0.9, hops=2), 0.9 * a + 0.81 * a @ a)
    torch.testing.assert_close(katz(a, 0.9), by_hand.sum(-1))


def test_visits_are_those_of_walks():
    a = affinities(3)
    p, gamma = a / a.sum(-1, keepdim=True), 0.7
    visits = expected_visits(a, gamma)
    torch.testing.assert_close(visits.sum(-1), torch.full((3,), 1 / (1 - gamma), dtype=D))
    # Many walks from token 0, one step at a time.
    rng, at, counts = torch.Generator().manual_seed(0), torch.zeros(20_000, dtype=torch.long), torch.zeros(3, dtype=D)
    while len(at):
        counts += torch.bincount(at, minlength=3)
        at = at[torch.rand(len(at), generator=rng) < gamma]
        at = torch.multinomial(p[at], 1, generator=rng)[:, 0] if len(at) else at
    torch.testing.assert_close(counts / 20_000, visits[0], rtol=0.05, atol=0)


def test_a_token_that_looks_nowhere_ends_the_walk():
    a = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=D)
    torch.testing.assert_close(expected_visits(a, 0.5), torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=D))


def test_power_iteration_finds_the_eigenvector():
    a = affinities()
    values, vectors = torch.linalg.eig(a)
    exact = vectors[:, values.abs().argmax()].real.abs()
    torch.testing.assert_close(dominant(a), exact / exact.norm())
    torch.testing.assert_close(dominant(a, left=True), dominant(a.T))


def test_long_walks_tell_the_eigenvector_short_ones_the_degree():
    a = moons()
    radius = torch.linalg.eigvalsh(a).max()
    degree, vector = a.sum(-1), dominant(a, iterations=2000)

    def cosine(x, y):
        return torch.nn.functional.cosine_similarity(x, y, 0)

    near, far = katz(a, 0.999 / radius), katz(a, 0.01 / radius)
    assert cosine(near, vector) > 0.999 > cosine(far, vector)
    assert cosine(far, degree) > 0.999
    sums = [cosine(walks(a, 0.999 / radius, hops=h).sum(-1), vector) for h in (1, 4, 16)]
    assert sums[0] < sums[1] < sums[2]


def test_the_linear_forms_vector_is_close_to_the_eigenvector():
    tokens = torch.randn(64, 16, dtype=D) + torch.linspace(0, 2, 64, dtype=D)[:, None]
    affinity = (tokens @ tokens.T).relu()
    found = torch.nn.functional.cosine_similarity(centrality(tokens, tokens), dominant(affinity, left=True), 0)
    assert found > 0.98


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="spectral radius must be below 1"):
        walks(torch.eye(3))
    with pytest.raises(ValueError, match="a must be square"):
        dominant(torch.ones(2, 3))
    with pytest.raises(ValueError, match="a must not be negative"):
        katz(-torch.eye(2))
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\)"):
        expected_visits(torch.eye(2), 1.0)
    with pytest.raises(ValueError, match="hops must be at least 1"):
        walks(torch.eye(2), hops=0)
