"""From maps to masks: the points an attention map asks about, a SAM of transformers to answer, and merging of masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.lens.regions import components


@dataclass(frozen=True)
class Segment:
    """An object: its name, its mask (H, W) bool, how sure of it the segmenter is, and the points that asked for it."""

    name: str
    mask: Tensor
    score: float
    points: Tensor  # (P, 2) x, y in pixels
    labels: Tensor  # (P): 1 on the object, 0 off it


def point_prompts(heat: Tensor, size: tuple[int, int], threshold: float | None = None) -> tuple[Tensor, Tensor]:
    """A point on the object and one off it, `(P, 2)` as x, y in pixels of an image of `size`, and their labels (1, 0).

    Of the cells of `heat` (h, w) above `threshold` (their mean, if None), the largest connected region is the object:
    the first point is its hottest cell, the second the coldest of all others. Nothing above it gives no points; where
    the object is everything, there is no second point.
    """
    if heat.ndim != 2:
        raise ValueError(f"heat must be (h, w), got {tuple(heat.shape)}")
    labels, count = components(heat > (heat.mean() if threshold is None else threshold))
    if not count:
        return torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)
    inside = labels == 1 + torch.bincount(labels.flatten(), minlength=count + 1)[1:].argmax()
    cells = [heat.masked_fill(~inside, -torch.inf).argmax()]
    if not bool(inside.all()):
        cells.append(heat.masked_fill(inside, torch.inf).argmin())
    at = torch.stack(cells)
    columns = torch.stack([at % heat.shape[1], at // heat.shape[1]], -1).cpu().float() + 0.5
    scale = columns.new_tensor([size[1] / heat.shape[1], size[0] / heat.shape[0]])
    return columns * scale, torch.tensor([1, 0][: len(cells)])


class Segmenter:
    """A `SamModel` of transformers with its processor, on one image after another: `look` at it, then `mask` points."""

    def __init__(self, model: Any, processor: Any, *, refinements: int = 2) -> None:
        if refinements < 0:
            raise ValueError(f"refinements must not be negative, got {refinements}")
        self.model, self.processor, self.refinements = model, processor, refinements
        self.seen: Tensor | None = None

    @classmethod
    def from_pretrained(cls, name: str, **keywords: Any) -> Segmenter:
        """The model by its directory or name."""
        from attnlab.lens.multimodal import transformers

        package = transformers("segmentation")
        return cls(
            package.SamModel.from_pretrained(name).eval(), package.SamProcessor.from_pretrained(name), **keywords
        )

    def look(self, image: Any) -> None:
        """Encode an image (PIL); the masks that follow are of it."""
        inputs = self.processor(images=image, return_tensors="pt").to(self.model.device)
        self.seen = self.model.get_image_embeddings(inputs["pixel_values"])
        self.size = tuple(int(n) for n in inputs["original_sizes"][0])
        self.fed = tuple(int(n) for n in inputs["reshaped_input_sizes"][0])  # before padding to a square

    @torch.no_grad()
    def mask(self, points: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """The best mask (H, W) of what the points (P, 2) in pixels say, and SAM's own estimate of its IoU.

        The mask's logits are given back to SAM with the points, as often as `refinements` says.
        """
        if self.seen is None:
            raise ValueError("there is no image: look at one first")
        device = self.seen.device
        scale = torch.tensor([self.fed[1] / self.size[1], self.fed[0] / self.size[0]])
        given = {
            "image_embeddings": self.seen,
            "input_points": (points.cpu() * scale).view(1, 1, -1, 2).to(self.seen),
            "input_labels": labels.view(1, 1, -1).to(device),
        }
        for _ in range(1 + self.refinements):
            out = self.model(**given)
            scores = out.iou_scores[0, 0]
            best = int(scores.argmax())
            logits, score = out.pred_masks[:, 0, best : best + 1], float(scores[best])
            given["input_masks"] = logits
        side = self.model.config.vision_config.image_size
        large = F.interpolate(logits.float(), (side, side), mode="bilinear")[..., : self.fed[0], : self.fed[1]]
        return F.interpolate(large, self.size, mode="bilinear")[0, 0] > 0, score


def segment_map(
    segmenter: Segmenter, heat: Tensor, name: str = "", *, rounds: int = 3, threshold: float | None = None
) -> list[Segment]:
    """The masks that an attention map (h, w) leads to: after each, what it covers is taken out of the map.

    At most `rounds` of them, and as long as the map is above `threshold` (its mean, if None) anywhere.
    """
    heat = heat.clone()
    level = float(heat.mean()) if threshold is None else threshold
    height, width = segmenter.size
    rows, columns = ((torch.arange(n) + 0.5) * of / n for n, of in zip(heat.shape, (height, width), strict=True))
    found = []
    for _ in range(rounds):
        points, labels = point_prompts(heat, (height, width), level)
        if not len(points):
            break
        mask, score = segmenter.mask(points, labels)
        found.append(Segment(name, mask, score, points, labels))
        heat[mask[rows.long()][:, columns.long()].to(heat.device)] = 0.0
        x, y = points[0].tolist()
        heat[int(y * heat.shape[0] / height), int(x * heat.shape[1] / width)] = 0.0  # so that it ends
    return found


def intersection_over_union(masks: Tensor, others: Tensor) -> Tensor:
    """IoU (A, B) of masks (A, H, W) and (B, H, W); two empty masks have 0."""
    a, b = masks.flatten(1).float(), others.flatten(1).float()
    both = a @ b.T
    return both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1)


def suppress(segments: Sequence[Segment], *, iou: float = 0.5) -> list[Segment]:
    """The surest first, without empty ones and those that overlap a surer one of their name more than `iou`."""
    kept: list[Segment] = []
    for segment in sorted(segments, key=lambda s: -s.score):
        alike = [k.mask for k in kept if k.name == segment.name]
        if not bool(segment.mask.any()):
            continue
        if not alike or float(intersection_over_union(segment.mask[None], torch.stack(alike)).max()) <= iou:
            kept.append(segment)
    return kept


def placed(segment: Segment, size: tuple[int, int], corner: tuple[int, int]) -> Segment:
    """A segment of a part of an image whose left top corner is (x, y), in the whole image of `size`."""
    x, y = corner
    mask = segment.mask.new_zeros(size)
    mask[y : y + segment.mask.shape[0], x : x + segment.mask.shape[1]] = segment.mask
    return replace(segment, mask=mask, points=segment.points + torch.tensor([float(x), float(y)]))
