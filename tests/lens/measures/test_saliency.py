"""Context-aware saliency and the Salient Relevance map: against a plain transcription, and on a digit classifier."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlab.lens.measures.saliency import attend_to_foci, context_saliency, lab, salient_relevance


def test_colours_are_skimages() -> None:
    color = pytest.importorskip("skimage.color")
    image = torch.rand(3, 9, 7, dtype=torch.float64)
    wanted = torch.from_numpy(color.rgb2lab(image.permute(1, 2, 0).numpy())).permute(2, 0, 1)
    torch.testing.assert_close(lab(image), wanted, rtol=0, atol=1e-3)


def by_pairs(image: torch.Tensor, scale: float, nearest: int) -> torch.Tensor:
    """1 − exp(−mean distance) of every patch at one scale, before it is brought to [0, 1], a pair at a time."""

    def patches(s):
        sized = image if s == 1 else F.interpolate(
            image[None], size=[max(7, round(n * s)) for n in image.shape[1:]], mode="bilinear", antialias=True
        )[0].clamp(0, 1)  # fmt: skip
        colours, longer = lab(sized), max(sized.shape[1:])
        return [
            (colours[:, y : y + 7, x : x + 7].flatten(), ((y + 3.5) / longer, (x + 3.5) / longer))
            for y in range(0, sized.shape[1] - 6, 3)
            for x in range(0, sized.shape[2] - 6, 3)
        ]

    own = patches(scale)
    others = [p for part in (1, 2, 4) if part == 1 or scale / part >= 0.2 for p in patches(scale / part)]
    largest = max(float((a - b).norm()) for a, _ in own for b, _ in others)
    found = []
    for i, (a, at) in enumerate(own):
        distances = sorted(
            float((a - b).norm()) / largest / (1 + 3 * math.dist(at, there))
            for k, (b, there) in enumerate(others)
            if k != i
        )
        found.append(1 - math.exp(-sum(distances[:nearest]) / len(distances[:nearest])))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_equals_a_loop_over_pairs_of_patches(scale: float) -> None:
    image = torch.rand(3, 28, 22, dtype=torch.float64)
    wanted = by_pairs(image, scale, nearest=8)
    wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    sized = [max(7, round(n * scale)) for n in (28, 22)]
    grid = [(n - 7) // 3 + 1 for n in sized]
    wanted = wanted.view(grid).numpy()
    for axis in (0, 1):  # between the centres of patches, constant beyond them
        pixels = (np.arange((28, 22)[axis]) + 0.5) * sized[axis] / (28, 22)[axis]
        centres = np.arange(grid[axis]) * 3 + 3.5
        wanted = np.apply_along_axis(lambda line, p=pixels, c=centres: np.interp(p, c, line), axis, wanted)
    torch.testing.assert_close(context_saliency(image, scales=[scale], nearest=8), torch.from_numpy(wanted))


def test_nothing_stands_out_of_a_constant() -> None:
    saliency = context_saliency(torch.full((3, 40, 30), 0.3))
    assert not saliency.any() and not attend_to_foci(saliency).any()


def blob(top: int, left: int) -> torch.Tensor:
    image = torch.zeros(3, 60, 60)
    image[:, top : top + 6, left : left + 6] = 1.0
    return image


def test_a_single_distinct_place_is_the_focus_and_moves_with_it() -> None:
    centres = []
    for top, left in ((24, 18), (24, 30)):
        saliency = context_saliency(blob(top, left))
        attended = attend_to_foci(saliency)
        assert (attended <= saliency + 1e-12).all() and 0 <= float(attended.min()) and float(attended.max()) <= 1
        rows, columns = (attended > 0.9 * attended.max()).nonzero().double().mean(0).tolist()
        assert abs(rows - top - 2.5) < 1 and abs(columns - left - 2.5) < 1
        centres.append(columns)
    assert centres[1] - centres[0] == pytest.approx(12, abs=0.7)


def test_distance_is_to_the_nearest_focus_and_the_farthest_place_gets_nothing() -> None:
    saliency = torch.full((1, 5), 0.5, dtype=torch.float64)
    saliency[0, 0] = 0.9
    assert attend_to_foci(saliency)[0].tolist() == pytest.approx([0.9, 0.375, 0.25, 0.125, 0.0])
    assert attend_to_foci(saliency * 0.5)[0, 0] == 0.45  # nothing above the threshold: the most salient is the focus


def digit_classifier():
    """Digits of 32 × 32 pixels, and two convolutions that know them."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    x = F.interpolate(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, size=32, mode="bilinear")
    y = torch.tensor(labels)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(110):
        rows = torch.arange(step * 64, step * 64 + 64) % 1500
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), x[1500:1540], y[1500:1540]


def test_what_it_points_at_is_what_a_classifier_needs() -> None:
    """Deleting pixels in decreasing order of the map costs more accuracy than at random, or by another image's map."""
    model, x, y = digit_classifier()
    found = salient_relevance(model, x)
    assert found.map.shape == (40, 32, 32) and found.relevance.shape == x.shape
    assert (found.map >= 0).all() and (found.map <= found.saliency).all()
    order = found.map.flatten(1).argsort(descending=True)
    chance = torch.rand(40, 1024).argsort()

    def area(order):
        kept = []
        for count in range(0, 520, 40):
            masked = x.flatten(1).scatter(1, order[:, :count], 0.0).view_as(x)
            with torch.no_grad():
                kept.append((model(masked).argmax(1) == y).float().mean())
        return torch.stack(kept).mean(), kept[0]

    (ours, whole), (random, _), (another, _) = area(order), area(chance), area(order.roll(1, 0))
    assert whole > 0.85
    assert ours < another < random


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        context_saliency(torch.rand(1, 9, 9))
    with pytest.raises(ValueError, match="at least 7 pixels"):
        context_saliency(torch.rand(3, 6, 9))
    with pytest.raises(ValueError, match="nearest"):
        context_saliency(torch.rand(3, 9, 9), nearest=0)
    with pytest.raises(ValueError, match=r"x must be \(B, 3 or 1"):
        salient_relevance(nn.Linear(2, 2), torch.rand(2, 2))
