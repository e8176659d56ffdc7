"""Shifted windows: the oracle is dense attention under a mask drawn place by place."""

import pytest
import torch
from torch import Tensor

from attnlab.nn.sparse.shifted_window import ShiftedWindow


def oracle(m: ShiftedWindow, x: Tensor, grid: tuple[int, int]) -> Tensor:
    height, width = grid
    w = min(m.window, height, width)
    shift = 0 if min(grid) <= m.window else m.shift
    padded = tuple(-(-n // w) * w for n in grid)
    places = [(i, j) for i in range(height) for j in range(width)]

    def window_and_place(i: int, j: int) -> tuple[tuple, tuple[int, int]]:
        """The window after the roll, with the side of the edge it came from, and the place in it."""
        r, c = (i - shift) % padded[0], (j - shift) % padded[1]
        return (r // w, c // w, i < shift, j < shift), (r % w, c % w)

    q, k, v = m.wqkv(x).unflatten(-1, (3, m.heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    for a, first in enumerate(places):
        window, (r, c) = window_and_place(*first)
        for b, second in enumerate(places):
            other, (s, d) = window_and_place(*second)
            row = (r - s + m.window - 1) * (2 * m.window - 1) + c - d + m.window - 1
            bias = m.relative.table[row] if window == other else torch.full((m.heads,), -torch.inf)
            scores[:, :, a, b] += bias
    return m.wo((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [((4, 8), 4, 0), ((8, 8), 4, 2), ((6, 9), 3, 1), ((5, 7), 3, 0), ((5, 7), 3, 1), ((3, 8), 4, 2), ((1, 1), 3, 1)],
)
def test_equals_dense_attention_under_the_mask(grid: tuple[int, int], window: int, shift: int) -> None:
    m = ShiftedWindow(4, heads=2, window=window, shift=shift).double()
    torch.nn.init.normal_(m.relative.table)
    x = torch.randn(2, grid[0] * grid[1], 4, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(m(x, grid=grid), oracle(m, x, grid))


def test_two_blocks_with_and_without_shift_reach_beyond_a_window() -> None:
    x = torch.randn(1, 64, 4, dtype=torch.float64, requires_grad=True)
    plain, shifted = (ShiftedWindow(4, heads=2, window=4, shift=s).double() for s in (0, 2))
    (alone,) = torch.autograd.grad(plain(x, grid=(8, 8))[0, 0].sum(), x)
    (both,) = torch.autograd.grad(plain(shifted(x, grid=(8, 8)), grid=(8, 8))[0, 0].sum(), x)
    assert (alone[0].abs().sum(-1) > 0).sum() == 16
    assert (both[0].abs().sum(-1) > 0).sum() == 36  # windows of 2, 4 and 2 a side, of which the first two touch


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="shift"):
        ShiftedWindow(8, heads=2, window=4, shift=4)
    with pytest.raises(ValueError, match="causal"):
        ShiftedWindow(8, heads=2, causal=True)
