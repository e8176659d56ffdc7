"""Windows by bands: what unfolding the whole map gives, at any width, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.nn.spatial.bands import window_scores, window_sum


def windows(maps: Tensor, window: int) -> Tensor:
    """`(B, H, Y, X, D)` → `(B, H, Y, X, window², D)`, zeros outside."""
    b, h, y, x, d = maps.shape
    flat = maps.permute(0, 1, 4, 2, 3).reshape(b, h * d, y, x)
    return F.unfold(flat, window, padding=window // 2).view(b, h, d, window**2, y, x).permute(0, 1, 4, 5, 3, 2)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (2, 16), (4, 17), (2, 35)])
@pytest.mark.parametrize("window", [1, 3, 5])
def test_equal_unfolded_windows_and_so_do_the_gradients(size: tuple[int, int], window: int) -> None:
    q, k = (torch.randn(2, 3, *size, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.randn(2, 3, *size, window**2, dtype=torch.float64, requires_grad=True)
    pairs = [
        (window_scores(q, k, window), torch.einsum("...d,...wd->...w", q, windows(k, window)), (q, k)),
        (window_sum(weights, k, window), torch.einsum("...w,...wd->...d", weights, windows(k, window)), (weights, k)),
    ]
    for ours, wanted, inputs in pairs:
        torch.testing.assert_close(ours, wanted)
        ours, wanted = (torch.autograd.grad(y.pow(2).sum(), inputs) for y in (ours, wanted))
        torch.testing.assert_close(ours, wanted)
