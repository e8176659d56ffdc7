"""How much each head's output owes to the image: its distance to what the head says when the image is left out.

Pure functions of head outputs at the position that predicts the next token, before the output projection. Source: arXiv
2412.13949, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def divergence(seen: Tensor, unseen: Tensor, *, distance: str = "l2") -> Tensor:
    """Vision-aware head divergence: how far the heads' outputs `(…, H, D)` with the image are from those without.

        VHD_h = ‖A_h(image, text) − A_h(text)‖₂ → (…, H)

    `distance="sq_l2"` for its square, as a port of the authors' code has it: it ranks heads alike, but the filter below
    compares it with means and standard deviations, which it does not keep.
    """
    if seen.shape != unseen.shape or seen.dim() < 2:
        raise ValueError(f"seen and unseen must both be (…, H, D), got {tuple(seen.shape)} and {tuple(unseen.shape)}")
    if distance not in ("l2", "sq_l2"):
        raise ValueError(f"distance must be 'l2' or 'sq_l2', got {distance!r}")
    length = torch.linalg.vector_norm(seen - unseen, dim=-1)
    return length if distance == "l2" else length.square()


def token_divergence(divergences: Tensor | Sequence[Tensor], k: int = 4) -> Tensor:
    """Token-VHD: over the layers, the sum of each layer's `k` largest of `(L, …, H)`: `(…)`.

    Low where a token owes little to the image: a detector of hallucinated words. The paper prints no k.
    """
    layers = list(divergences)
    if not layers:
        raise ValueError("divergences holds no layer")
    if k < 1 or any(k > layer.shape[-1] for layer in layers):
        raise ValueError(f"k must be 1 to the number of heads, {min(x.shape[-1] for x in layers)}, got {k}")
    return torch.stack([layer.topk(k, -1).values.sum(-1) for layer in layers]).sum(0)


def without_surges(divergences: Tensor, unseen: Tensor) -> Tensor:
    """One layer's `(…, H)` with 0 for heads that diverge because they fire when the image is missing.

        VHD_h > mean + std of VHD, and ‖A_h(text)‖² > mean + std of the same over the layer's heads: both at once

    `unseen (…, H, D)` are the outputs without the image; std is the sample's (torch's default).
    """
    if divergences.shape != unseen.shape[:-1]:
        wanted = (*divergences.shape, "D")
        raise ValueError(
            f"unseen must be {wanted} with divergences {tuple(divergences.shape)}, got {tuple(unseen.shape)}"
        )
    surge = _outlying(divergences) & _outlying(unseen.square().sum(-1))
    return divergences.masked_fill(surge, 0.0)


def aware_heads(divergences: Tensor) -> Tensor:
    """Which heads of a layer `(…, H)` are above its median (the mean of the middle two): bool, half of them at most."""
    if divergences.shape[-1] < 2:
        return torch.zeros_like(divergences, dtype=torch.bool)  # nothing is above the median of one
    wide = divergences.to(torch.promote_types(divergences.dtype, torch.float32))
    return wide > torch.quantile(wide, 0.5, dim=-1, keepdim=True)


def _outlying(x: Tensor) -> Tensor:
    return x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True)
