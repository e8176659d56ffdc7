"""The indicators of attention matrices: known values of known matrices."""

from __future__ import annotations

import math

import pytest
import torch

from attnlab.lens import indicators

N = 6
DIAGONAL = torch.eye(N)
UNIFORM = torch.ones(N, N).tril() / torch.arange(1, N + 1).view(-1, 1)
FIRST = torch.zeros(N, N).index_fill(1, torch.tensor([0]), 1.0)


def test_entropy_is_that_of_each_row_summed() -> None:
    assert indicators.entropy(DIAGONAL).item() == 0
    torch.testing.assert_close(
        indicators.entropy(UNIFORM).item(), sum(math.log(i) for i in range(1, N + 1)), rtol=1e-6, atol=0
    )


def test_concentration_of_one_key_per_query_is_the_root_of_n() -> None:
    torch.testing.assert_close(indicators.concentration(DIAGONAL), torch.tensor(N**0.5))
    assert indicators.concentration(UNIFORM) < indicators.concentration(FIRST)


def test_diversity_is_zero_for_equal_heads_and_counts_the_lower_triangle() -> None:
    assert indicators.head_diversity(torch.stack([UNIFORM, UNIFORM])) == 0
    two = torch.stack([DIAGONAL, FIRST])
    # They differ, by 1 and so by a deviation of 1/√2, in the diagonal and the first column but for their common corner.
    torch.testing.assert_close(indicators.head_diversity(two).item(), 2 * (N - 1) / 2**0.5 * 2 / (N * (N + 1)))


def test_sink_and_local_focus_read_their_places() -> None:
    assert indicators.sink(FIRST) == 1
    assert indicators.sink(DIAGONAL) == pytest.approx(1 / N)
    shifted = torch.diag(torch.ones(N - 2), -2)
    assert [indicators.local_focus(shifted, d).item() for d in range(4)] == [0, 0, 1, 0]


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="square"):
        indicators.sink(torch.ones(2, 3))
    with pytest.raises(ValueError, match="two heads"):
        indicators.head_diversity(UNIFORM)
    with pytest.raises(ValueError, match="distance"):
        indicators.local_focus(UNIFORM, N)
