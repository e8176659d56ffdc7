"""What an image-text matcher looks at, by attention and gradient, and the part of the image to keep by it (AGLA).

Source: arXiv 2406.12718 (Lackel/AGLA), after GradCAM on the cross-attention of BLIP.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab.lens.regions import ndimage


def attention_gradcam(attention: Tensor, gradient: Tensor, text_mask: Tensor | None = None) -> Tensor:
    """How much the text's match rests on each patch, `(B, V)`:

        map = Σ_{t=1..n} mean_heads C_t ⊙ relu(∂match/∂C_t) / n,      n tokens without the first and the last

    attention C and its gradient (B, H, T, V): from text tokens to patches, without the class token; text_mask (B, T),
    1 where a token is, padding on the right.
    """
    if attention.ndim != 4 or attention.shape != gradient.shape:
        raise ValueError(
            f"attention and gradient must be (B, H, T, V) alike, got {tuple(attention.shape)}, {tuple(gradient.shape)}"
        )
    batch, _, tokens, _ = attention.shape
    if text_mask is None:
        text_mask = torch.ones(batch, tokens, device=attention.device)
    if text_mask.shape != (batch, tokens):
        raise ValueError(f"text_mask must be {(batch, tokens)}, got {tuple(text_mask.shape)}")
    lengths = text_mask.sum(1).long() - 2
    if bool((lengths < 1).any()):
        raise ValueError("each text must have a token between its first and its last")
    place = torch.arange(tokens, device=attention.device)
    inner = (place >= 1) & (place <= lengths[:, None]) & text_mask.bool()
    cams = (attention * gradient.clamp(min=0)).mean(1)
    return (cams * inner.unsqueeze(-1).to(cams.dtype)).sum(1) / lengths[:, None].to(cams.dtype)


def heat_map(relevance: Tensor, size: tuple[int, int], *, blur: float = 0.02) -> Tensor:
    """A map `(h, w)` of patches, smooth over an image and in [0, 1]: `(H, W)` of `size`, float64.

    In [0, 1], cubic splines to the size (zero beyond the border, no value outside the range before), a Gaussian of
    `blur` times the longer side, and in [0, 1] again. A constant map gives zeros.
    """
    if relevance.ndim != 2:
        raise ValueError(f"relevance must be (h, w), got {tuple(relevance.shape)}")
    zoom = ndimage("a heat map")
    values = _unit(relevance.detach().double()).cpu().numpy()
    factors = [to / of for to, of in zip(size, values.shape, strict=True)]
    large = zoom.zoom(values, factors, order=3, mode="grid-constant", grid_mode=True).clip(values.min(), values.max())
    return _unit(torch.from_numpy(zoom.gaussian_filter(large, blur * max(size))).to(relevance.device))


def keep_hottest(heat: Tensor, similarity: float) -> Tensor:
    """The mask `(H, W)` of the hottest 1 − similarity / 2 of the image: the better text and image match, the less.

    similarity: the cosine of the matcher's embeddings of image and text, in [-1, 1].
    """
    share = min(max(1 - similarity / 2, 0.0), 1 - 1e-5)
    ordered = heat.flatten().sort(descending=True).values
    return heat >= ordered[int(len(ordered) * share)]


def _unit(values: Tensor) -> Tensor:
    values = values - values.min()
    return values / values.max() if values.max() > 0 else values
