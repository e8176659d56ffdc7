"""Points of a map, masks of points, and what is kept of the masks."""

from __future__ import annotations

import pytest
import torch

from attnlab.lens.segment import (
    Segment,
    Segmenter,
    intersection_over_union,
    placed,
    point_prompts,
    segment_map,
    suppress,
)
from lens.tiny_models import picture, sam


def test_a_point_on_the_largest_region_and_one_at_the_coldest_place() -> None:
    heat = torch.full((4, 6), 0.2)
    heat[1, 1:4] = torch.tensor([0.7, 0.8, 0.6])
    heat[3, 5] = 1.0  # hotter, but alone
    heat[0, 5] = 0.0
    points, labels = point_prompts(heat, (40, 120), 0.5)
    assert points.tolist() == [[50.0, 15.0], [110.0, 5.0]] and labels.tolist() == [1, 0]
    points, labels = point_prompts(heat, (40, 120), 2.0)
    assert points.shape == (0, 2) and not len(labels)
    points, labels = point_prompts(heat + 1, (40, 120), 0.5)
    assert labels.tolist() == [1]


def test_masks_have_the_images_size_and_come_from_the_processors_own_steps(transformers) -> None:
    model, processor = sam(transformers)
    segmenter, image = Segmenter(model, processor, refinements=0), picture(width=50, height=30)
    segmenter.look(image)
    points, labels = torch.tensor([[20.0, 10.0], [45.0, 25.0]]), torch.tensor([1, 0])
    mask, score = segmenter.mask(points, labels)
    inputs = processor(
        images=image, input_points=[[points.tolist()]], input_labels=[[labels.tolist()]], return_tensors="pt"
    )
    with torch.no_grad():
        out = model(**{k: v for k, v in inputs.items() if "sizes" not in k})
    masks = processor.post_process_masks(out.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])
    best = int(out.iou_scores[0, 0].argmax())
    assert mask.shape == (30, 50) and torch.equal(mask, masks[0][0, best])
    assert score == pytest.approx(float(out.iou_scores[0, 0, best]), abs=1e-5)


def test_refinement_gives_the_mask_back_to_sam(transformers) -> None:
    model, processor = sam(transformers)
    points, labels = torch.tensor([[20.0, 10.0]]), torch.tensor([1])
    inputs = processor(images=picture(), input_points=[[points.tolist()]], return_tensors="pt")
    segmenter = Segmenter(model, processor, refinements=2)
    segmenter.look(picture())
    given = {"pixel_values": inputs["pixel_values"], "input_points": inputs["input_points"].float()}
    with torch.no_grad():
        out = model(**given)
        for _ in range(2):
            best = int(out.iou_scores[0, 0].argmax())
            out = model(**given, input_masks=out.pred_masks[:, 0, best : best + 1])
    _, score = segmenter.mask(points, labels)
    assert score == pytest.approx(float(out.iou_scores.max()), abs=1e-5)
    segmenter.refinements = 0
    assert abs(segmenter.mask(points, labels)[1] - score) > 1e-4


class Paint:
    """A segmenter of painted images: the mask is what has the colour of the first point."""

    def look(self, image: torch.Tensor) -> None:
        self.image, self.size = image, tuple(image.shape)

    def mask(self, points, labels):
        x, y = points[0].long().tolist()
        return self.image == self.image[y, x], 0.9


def test_each_round_looks_for_what_has_not_been_found() -> None:
    image = torch.zeros(32, 32)
    image[4:12, 4:12], image[20:28, 20:28] = 1, 2
    heat = torch.zeros(4, 4)
    heat[0, 0], heat[1, 1], heat[2, 2], heat[3, 3] = 0.9, 0.8, 0.5, 0.4
    heat[0, 1] = 0.7
    painter = Paint()
    painter.look(image)
    found = segment_map(painter, heat, "thing", rounds=5, threshold=0.3)
    areas = [{int(v) for v in image[s.mask].unique()} for s in found]
    assert areas[0] == {1} and {2} in areas and len(found) <= 5
    assert len(segment_map(painter, heat, rounds=1)) == 1
    assert segment_map(painter, torch.zeros(4, 4), threshold=0.5) == []


def segment(name: str, score: float, box: tuple[int, int, int, int]) -> Segment:
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return Segment(name, mask, score, torch.zeros(1, 2), torch.ones(1))


def test_of_overlapping_masks_of_one_name_the_surest_stays() -> None:
    segments = [
        segment("dog", 0.5, (0, 0, 10, 10)),
        segment("dog", 0.9, (1, 0, 10, 10)),
        segment("cat", 0.4, (0, 0, 10, 10)),
        segment("dog", 0.3, (12, 12, 18, 18)),
        segment("dog", 1.0, (5, 5, 5, 5)),
    ]
    assert [(s.name, s.score) for s in suppress(segments)] == [("dog", 0.9), ("cat", 0.4), ("dog", 0.3)]


def test_overlap_is_intersection_over_union() -> None:
    masks = torch.stack([segment("", 1, box).mask for box in ((0, 0, 4, 4), (2, 0, 6, 4), (9, 9, 9, 9))])
    wanted = torch.tensor([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(intersection_over_union(masks, masks), wanted)


def test_a_part_is_put_where_it_was_cut_from() -> None:
    whole = placed(segment("dog", 1.0, (2, 3, 5, 6)), (40, 50), (30, 20))
    assert whole.mask.shape == (40, 50) and whole.mask.sum() == 9 and bool(whole.mask[23:26, 32:35].all())
    assert whole.points.tolist() == [[30.0, 20.0]]


def test_what_does_not_fit_is_refused(transformers) -> None:
    with pytest.raises(ValueError, match=r"\(h, w\)"):
        point_prompts(torch.rand(4), (8, 8))
    with pytest.raises(ValueError, match="look at one first"):
        Segmenter(*sam(transformers)).mask(torch.rand(1, 2), torch.ones(1))
    with pytest.raises(ValueError, match="refinements"):
        Segmenter(None, None, refinements=-1)
