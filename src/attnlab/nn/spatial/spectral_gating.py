"""Spectral gating (SpectFormer, GFNet): tokens mixed by a learned filter over the frequencies of their map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.mechanism import OnGrid


@register(
    Card(
        name="spectral_gating",
        title="SpectFormer: Frequency and Attention is what you need in a Vision Transformer",
        paper="2304.06446",
        system="spectformer",
        family="spatial",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_GRID,
        cost="N log N",
        sample={"spectrum": (4, 4)},
    )
)
class SpectralGating(OnGrid):
    """Every token hears the whole map in N log N: each channel's spectrum is multiplied by learned complex numbers.

        y = irfft2(rfft2(x) ⊙ filter)        over the grid, orthonormal

    x (B, H·W, C) with grid=(H, W) → the same shape. It is a circular convolution of each channel with
    √(HW) · irfft2(filter), so it commutes with cyclic shifts, and a filter of ones changes nothing. A filter of another
    size than the grid's spectrum is resized bilinearly. Cost: O(N C log N). Source: arXiv 2304.06446
    (badripatro/SpectFormers), after GFNet (arXiv 2107.00645).

    Args:
        spectrum: the filter's size, (H, W // 2 + 1) of the grid that it is learned for.
    """

    def __init__(self, dim: int, *, spectrum: tuple[int, int] = (14, 8), causal: bool = False) -> None:
        if causal:
            raise ValueError("causal must be False: a frequency is of the whole map")
        if len(spectrum) != 2 or min(spectrum) < 1:
            raise ValueError(f"spectrum must be two positive integers, got {spectrum!r}")
        super().__init__(dim)
        self.filter = nn.Parameter(0.02 * torch.randn(*spectrum, dim, 2))  # last axis: real and imaginary part

    def resized(self, spectrum: tuple[int, int]) -> Tensor:
        """The filter for another spectrum, complex, (*spectrum, C)."""
        weight = self.filter.to(torch.promote_types(self.filter.dtype, torch.float32))
        if weight.shape[:2] != spectrum:
            parts = F.interpolate(weight.permute(3, 2, 0, 1), spectrum, mode="bilinear", align_corners=True)
            weight = parts.permute(2, 3, 1, 0).contiguous()
        return torch.view_as_complex(weight)

    def over_grid(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        height, width = grid
        exact = torch.promote_types(x.dtype, torch.float32)  # there is no transform in half precision
        waves = torch.fft.rfft2(x.unflatten(1, (height, width)).to(exact), dim=(1, 2), norm="ortho")
        waves = waves * self.resized((height, width // 2 + 1))
        y = torch.fft.irfft2(waves, s=(height, width), dim=(1, 2), norm="ortho")
        return y.flatten(1, 2).to(x.dtype)
