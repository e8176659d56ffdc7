"""What stands out of an image in its context, and the Salient Relevance map: that of a network's relevance.

Sources: arXiv 1712.08268; context-aware saliency is of Goferman, Zelnik-Manor and Tal, doi 10.1109/TPAMI.2011.272.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import LENS, Card, register
from attnlab.lens.measures.relevance import Rule, layerwise_relevance, relevance_image
from attnlab.lens.regions import ndimage

SCALES = (1.0, 0.8, 0.5, 0.3)


def lab(image: Tensor) -> Tensor:
    """CIE L*a*b* (D65) of sRGB in [0, 1], both (…, 3, H, W)."""
    linear = torch.where(image <= 0.04045, image / 12.92, ((image.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    to_xyz = image.new_tensor(
        [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
    )
    white = image.new_tensor([0.95047, 1.0, 1.08883])
    t = torch.einsum("xc,...chw->...xhw", to_xyz / white[:, None], linear)
    f = torch.where(t > 0.008856, t.clamp(min=1e-12) ** (1 / 3), 7.787 * t + 16 / 116)
    x, y, z = f.unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -3)


def context_saliency(
    image: Tensor,
    *,
    patch: int = 7,
    scales: Sequence[float] = SCALES,
    nearest: int = 64,
    side: int = 250,
    smallest: float = 0.2,
) -> Tensor:
    """How much each place of an image (3, H, W) in [0, 1] stands out from the rest of it: (H, W) in [0, 1].

        d(i, k) = d_colour / (1 + 3 d_position)         S_i = 1 − exp(−mean of the `nearest` smallest d(i, k))

    over patches i of scale r (half overlapping) and k ≠ i of scales r, r/2, r/4 (those ≥ `smallest`): d_colour between
    their colours (L*a*b*), the largest that there is taken for 1; d_position between their centres, in units of the
    longer side. A patch is salient that is unlike even those most like it, and less so if these lie near. The maps of
    all `scales`, each brought to [0, 1], are averaged. `side`: images larger than that are made smaller first. Where
    all patches look alike, nothing stands out: zeros. Cost: N² patch², N the number of patches, in stripes.
    """
    if image.ndim != 3 or len(image) != 3:
        raise ValueError(f"image must be (3, H, W), got {tuple(image.shape)}")
    if nearest < 1 or patch < 2 or not scales:
        raise ValueError(f"nearest must be ≥ 1, patch ≥ 2 and scales not empty, got {nearest}, {patch}, {scales}")
    size = (image.shape[1], image.shape[2])
    if min(size) < patch:
        raise ValueError(f"image must be at least {patch} pixels on each side, one patch, got {size}")
    image = image.detach().double()
    image = _resized(image, min(1.0, side / max(size)), patch)
    maps = []
    for scale in scales:
        others = [scale / part for part in (1, 2, 4) if part == 1 or scale / part >= smallest]
        seen = [_patches(_resized(image, s, patch), patch) for s in others]
        own, places, sized = seen[0]
        distances = _nearest(own, places, torch.cat([s[0] for s in seen]), torch.cat([s[1] for s in seen]), nearest)
        maps.append(_spread(_unit(1 - torch.exp(-distances.mean(1))), sized, patch, size))
    return torch.stack(maps).mean(0)


def attend_to_foci(saliency: Tensor, *, threshold: float = 0.8) -> Tensor:
    """S ⊙ (1 − d), d the distance to the nearest place with S > threshold, the farthest being 1: (H, W).

    What is near a focus of attention belongs to it. Without a place above the threshold, the most salient is the focus.
    """
    foci = saliency > threshold
    if not bool(foci.any()):
        foci = saliency == saliency.max()
    away = torch.from_numpy(ndimage("distance to foci").distance_transform_edt(~foci.cpu().numpy())).to(saliency)
    return saliency * (1 - away / away.max().clamp(min=1))


@dataclass(frozen=True)
class SalientRelevance:
    """The map `(B, H, W)` in [0, 1], the saliency that it is made of, and the relevance of the pixels (B, C, H, W)."""

    map: Tensor
    saliency: Tensor
    relevance: Tensor


_TITLE = (
    "Beyond saliency: understanding convolutional neural networks from saliency prediction on layer-wise relevance "
    "propagation"
)


@register(
    Card(
        name="salient_relevance",
        title=_TITLE,
        paper="1712.08268",
        family="lens",
        kind=LENS,
        system="srmap",
        cost="one backward pass, and N² patches compared",
    )
)
def salient_relevance(
    model: nn.Module,
    x: Tensor,
    *,
    target: Tensor | int | None = None,
    rule: Rule = "official",
    bounds: tuple[float, float] | None = None,
    threshold: float = 0.8,
    **saliency: object,
) -> SalientRelevance:
    """Which areas of an image a convolutional network attends to: areas, where its relevance alone is scattered dots.

        SR = S ⊙ (1 − d_foci),     S = context_saliency(|R|),     R = layerwise_relevance(model, x)

    model: a chain of layers that takes x (B, 3 or 1, H, W) to logits; `target`, `rule`, `bounds` as of
    `layerwise_relevance`, `threshold` of `attend_to_foci`, other keywords of `context_saliency`. No prior draws the map
    to the centre. Source: arXiv 1712.08268.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"x must be (B, 3 or 1, H, W), got {tuple(x.shape)}")
    relevance = layerwise_relevance(model, x, target=target, rule=rule, bounds=bounds).input
    pictures = relevance_image(relevance).expand(-1, 3, -1, -1)
    salient = torch.stack([context_saliency(p, **saliency) for p in pictures])  # type: ignore[arg-type]
    return SalientRelevance(torch.stack([attend_to_foci(s, threshold=threshold) for s in salient]), salient, relevance)


def _resized(image: Tensor, scale: float, patch: int) -> Tensor:
    if scale == 1:
        return image
    size = [max(patch, round(n * scale)) for n in image.shape[1:]]
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def _patches(image: Tensor, patch: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Patches as vectors (N, 3 · patch²) of L*a*b*, their centres (N, 2) in longer sides, and the image's size."""
    vectors = F.unfold(lab(image)[None], patch, stride=patch // 2)[0].T
    height, width = image.shape[1:]
    axes = [
        torch.arange(_count(n, patch), dtype=image.dtype, device=image.device) * (patch // 2) + patch / 2
        for n in (height, width)
    ]
    return vectors, torch.cartesian_prod(*axes) / max(height, width), (height, width)


def _count(pixels: int, patch: int) -> int:
    """How many patches there are along an axis."""
    return (pixels - patch) // (patch // 2) + 1


def _spread(values: Tensor, sized: tuple[int, int], patch: int, size: tuple[int, int]) -> Tensor:
    """The values (N) of patches of an image of size `sized`, between their centres, over one of `size`: (H, W)."""
    grid = [_count(n, patch) for n in sized]
    axes = []
    for pixels, of, count in zip(size, sized, grid, strict=True):
        centres = (torch.arange(pixels, dtype=values.dtype, device=values.device) + 0.5) * of / pixels
        axes.append((centres - patch / 2) / (patch // 2) / max(count - 1, 1) * 2 - 1)
    at = torch.stack(torch.meshgrid(axes[1], axes[0], indexing="xy"), -1)
    return F.grid_sample(values.view(1, 1, *grid), at[None], padding_mode="border", align_corners=True)[0, 0]


def _nearest(own: Tensor, at: Tensor, others: Tensor, places: Tensor, nearest: int) -> Tensor:
    """The smallest distances (N, K) of patches to others, of which the first N are they themselves."""
    centre = own.mean(0)
    own, others = own - centre, others - centre
    squares = others.square().sum(1)
    found, largest = [], own.new_zeros(())
    for start in range(0, len(own), 256):
        rows = slice(start, start + 256)
        colour = torch.addmm(squares, own[rows], others.T, alpha=-2).add_(own[rows].square().sum(1, keepdim=True))
        colour = colour.clamp_(min=0).sqrt_()
        colour[range(len(colour)), range(start, start + len(colour))] = 0.0
        largest = torch.maximum(largest, colour.max())
        distance = colour.div_(torch.cdist(at[rows], places).mul_(3).add_(1))
        distance[range(len(distance)), range(start, start + len(distance))] = torch.inf
        found.append(distance.topk(min(nearest, len(others) - 1), largest=False).values)
    # Differences too small to be differences of colour are rounding.
    return torch.cat(found) / largest if largest > 1e-6 else torch.zeros_like(torch.cat(found))


def _unit(values: Tensor) -> Tensor:
    values = values - values.min()
    return values / values.max() if values.max() > 0 else values
