"""Spectral gating: a circular convolution, the identity, linear, shifts, and what a real transform cannot hear."""

import math

import pytest
import torch

from attnlab.nn.spatial.spectral_gating import SpectralGating

D = torch.float64
GRIDS = [(6, 6), (5, 7), (4, 3)]


def gate(grid: tuple[int, int], dim: int = 3) -> SpectralGating:
    module = SpectralGating(dim, spectrum=(grid[0], grid[1] // 2 + 1)).to(D)
    module.filter.data = torch.randn_like(module.filter)
    return module


@pytest.mark.parametrize("grid", GRIDS)
def test_it_is_a_circular_convolution(grid):
    module, (h, w) = gate(grid), grid
    x = torch.randn(2, h * w, 3, dtype=D)
    kernel = torch.fft.irfft2(torch.view_as_complex(module.filter), s=grid, dim=(0, 1), norm="ortho")
    maps, y = x.unflatten(1, grid), torch.zeros(2, h, w, 3, dtype=D)
    for i in range(h):
        for j in range(w):
            y += kernel[i, j] * maps.roll((i, j), (1, 2)) / math.sqrt(h * w)
    torch.testing.assert_close(module(x, grid=grid), y.flatten(1, 2))


@pytest.mark.parametrize("grid", GRIDS)
def test_a_filter_of_ones_changes_nothing(grid):
    module, x = gate(grid), torch.randn(2, grid[0] * grid[1], 3, dtype=D)
    module.filter.data = torch.tensor([1.0, 0.0], dtype=D).expand_as(module.filter).clone()
    torch.testing.assert_close(module(x, grid=grid), x)


@pytest.mark.parametrize("grid", GRIDS)
def test_it_is_linear_and_goes_along_with_shifts(grid):
    module = gate(grid)
    x, y = (torch.randn(2, grid[0] * grid[1], 3, dtype=D) for _ in range(2))
    torch.testing.assert_close(module(2 * x - y, grid=grid), 2 * module(x, grid=grid) - module(y, grid=grid))
    shifted = x.unflatten(1, grid).roll((1, 2), (1, 2)).flatten(1, 2)
    after = module(x, grid=grid).unflatten(1, grid).roll((1, 2), (1, 2)).flatten(1, 2)
    torch.testing.assert_close(module(shifted, grid=grid), after)


def test_the_constant_cannot_be_turned():
    module, x = gate((4, 6)), torch.randn(1, 24, 3, dtype=D)
    before = module(x, grid=(4, 6))
    with torch.no_grad():
        module.filter[0, 0, :, 1] += 5  # the imaginary part of what multiplies the sum of the map
        module.filter[0, 3, :, 1] += 5  # and of what alternates from column to column
    torch.testing.assert_close(module(x, grid=(4, 6)), before)
    with torch.no_grad():
        module.filter[0, 1, :, 1] += 5
    assert not torch.allclose(module(x, grid=(4, 6)), before)


def test_the_last_axis_is_the_width():
    x = torch.randn(1, 15, 2, dtype=D)
    assert gate((3, 5), 2)(x, grid=(3, 5)).shape == x.shape  # 3 × 3 numbers, and not 2 × 5
    with pytest.raises(ValueError, match="grid must multiply to the number of tokens 15"):
        gate((3, 5), 2)(x, grid=(4, 4))


def test_a_filter_is_resized_for_other_grids():
    module = gate((8, 8), 2)
    module.filter.data = torch.tensor([0.5, -1.0], dtype=D).expand_as(module.filter).clone()
    wanted = torch.full((6, 4, 2), complex(0.5, -1.0), dtype=torch.complex128)
    torch.testing.assert_close(module.resized((6, 4)), wanted)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="spectrum must be two positive integers"):
        SpectralGating(4, spectrum=(0, 2))
    with pytest.raises(ValueError, match="causal must be False"):
        SpectralGating(4, causal=True)
