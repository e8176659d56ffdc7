"""Tokens before a grid see all and are seen by all; the grid behind them keeps its own pattern, and its speed."""

import pytest
import torch

from attnlab import attend
from attnlab.backends.tiles import tiling
from attnlab.patterns import Neighborhood, Prefixed, Window


@pytest.mark.parametrize("count", [1, 5, 4])
def test_every_backend_gives_attention_under_the_matrix_of_its_definition(count: int) -> None:
    inner = Neighborhood((7, 9), 3)
    n = count + 63
    wanted = torch.ones(n, n, dtype=torch.bool)
    wanted[count:, count:] = inner.matrix(63)
    pattern = Prefixed(inner, count)
    assert torch.equal(pattern.matrix(n), wanted)
    q, k, v = torch.randn(3, 2, 3, n, 8, dtype=torch.float64, requires_grad=True).unbind()
    scores = (q @ k.mT * 8**-0.5).masked_fill(~wanted, -torch.inf)
    oracle = scores.softmax(-1) @ v
    for backend in ("tiles", "dense", "reference"):
        torch.testing.assert_close(attend(q, k, v, pattern=pattern, backend=backend), oracle)
    g = torch.randn_like(oracle)
    found = torch.autograd.grad(attend(q, k, v, pattern=pattern, backend="tiles"), (q, k, v), g)
    for ours, theirs in zip(found, torch.autograd.grad(oracle, (q, k, v), g), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_class_token_costs_one_row_and_one_column() -> None:
    inner = Neighborhood((32, 32), 7)
    alone, behind = tiling(inner, 1024, 1024).pairs, tiling(Prefixed(inner, 1), 1025, 1025).pairs
    assert behind <= alone + 1024 + 1025


@pytest.mark.parametrize("count", [2, 3])
def test_an_inner_pattern_without_tiles_of_its_own_works_too(count: int) -> None:
    q, k, v = torch.randn(3, 1, 2, 200 + count, 8, dtype=torch.float64).unbind()
    pattern = Prefixed(Window(9, causal=False), count)
    ours, oracle = (attend(q, k, v, pattern=pattern, backend=name) for name in ("tiles", "reference"))
    torch.testing.assert_close(ours, oracle)


def test_lengths_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="8 × 8 holds 64 tokens"):
        Prefixed(Neighborhood((8, 8), 3), 1).check(64, 64)
    with pytest.raises(ValueError, match="behind the first 3"):
        Prefixed(Window(3), 3).check(3, 3)
    with pytest.raises(ValueError, match="count must be"):
        Prefixed(Window(3), 0)
