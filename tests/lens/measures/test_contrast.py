"""Contrastive maps and the regions kept of them: against numpy, scipy and PIL, and what must hold of any."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from attnlab.lens.measures.contrast import contrast, fuse, keep_regions, map_entropy, square_grid
from attnlab.lens.regions import bounding_box, components

GRID, SIZE = (4, 6), (30, 50)


def maps(seed: int, steps: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, 2, 24, generator=generator).softmax(-1)


def test_equals_enlarging_every_layer_and_step_with_pil() -> None:
    query, general = maps(0), maps(1, steps=5)
    wanted = np.zeros(SIZE)
    for t in range(3):
        for layer in range(2):
            ratio = (query[t, layer] / (general[t, layer] + 1e-8)).view(GRID).numpy()
            large = Image.fromarray(ratio).resize(SIZE[::-1], Image.Resampling.BILINEAR)
            wanted += (t + 1) * np.asarray(large, dtype=np.float64)
    np.testing.assert_allclose(fuse(query, general, GRID, SIZE).numpy(), wanted, rtol=1e-6)


def test_scale_of_the_questions_maps_does_not_move_the_mask_of_one_step() -> None:
    query, general = maps(0), maps(1)
    scores = [fuse(q, general, GRID, SIZE, steps="first") for q in (query, query * 8)]
    assert torch.equal(keep_regions(scores[0]), keep_regions(scores[1]))


def test_equal_maps_give_a_constant() -> None:
    scores = fuse(maps(0), maps(0), GRID, SIZE)
    assert scores.std() / scores.mean() < 1e-5


def test_all_steps_of_one_are_the_first() -> None:
    query, general = maps(0, steps=1), maps(1)
    assert torch.equal(fuse(query, general, GRID, SIZE), fuse(query, general, GRID, SIZE, steps="first"))


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_all_regions_together_are_the_fraction(fraction: float) -> None:
    scores = torch.rand(SIZE, dtype=torch.float64)
    assert abs(int(keep_regions(scores, fraction=fraction, least=10**6).sum()) - round(fraction * 1500)) <= 1


def test_regions_are_ranked_by_score_or_by_area_and_specks_go() -> None:
    scores = torch.zeros(10, 10)
    scores[:2, :2], scores[5:8, 5:8], scores[9, 0] = 5.0, 1.0, 9.0
    best = {rank: keep_regions(scores, fraction=0.14, rank=rank, least=1) for rank in ("sum", "area")}
    assert best["sum"][0, 0] and best["sum"].sum() == 4
    assert best["area"][6, 6] and best["area"].sum() == 9
    without = keep_regions(scores, fraction=0.14, rank="specks", specks=20)  # of 14 pixels: two at least
    assert without.sum() == 13 and not without[9, 0]


def test_regions_meet_at_edges_not_at_corners() -> None:
    labels, count = components(torch.eye(3, dtype=torch.bool))
    assert count == 3 and labels.diagonal().tolist() == [1, 2, 3]


def test_box_of_nothing_is_everything() -> None:
    assert bounding_box(torch.zeros(3, 5, dtype=torch.bool)) == (0, 0, 5, 3)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 2:4] = True
    assert bounding_box(mask) == (2, 1, 4, 2)


def test_entropy_of_uniform_attention_is_the_logarithm() -> None:
    assert map_entropy(torch.full((2, 16), 1 / 16)).tolist() == pytest.approx([math.log(16)] * 2)
    assert map_entropy(torch.eye(3)).tolist() == [0, 0, 0]


def test_the_question_stands_out_where_plain_attention_shows_noise() -> None:
    """Bright cells draw attention under both prompts, the question's own cell under one: 4 × 4 cells."""
    noise, signal = [0, 3, 12, 15], 6
    general = torch.full((1, 1, 16), 0.02)
    general[..., noise] = 0.19
    query = general.clone()
    query[..., signal] = 0.1
    query += 1e-3 * torch.rand(16)
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside.view(-1)[signal] = True
    at = inside.repeat_interleave(8, 0).repeat_interleave(8, 1)

    def top(general: torch.Tensor) -> torch.Tensor:
        return keep_regions(fuse(query, general, (4, 4), (32, 32)), fraction=0.1, least=1)

    assert (top(general) & at).sum() == at.sum()
    assert not (top(torch.ones_like(query)) & at).any()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"grid \(3, 3\) does not hold 24"):
        fuse(maps(0), maps(1), (3, 3), SIZE)
    with pytest.raises(ValueError, match="same layers"):
        fuse(maps(0), maps(0)[:, :1], GRID, SIZE)
    with pytest.raises(ValueError, match="24 and 12 image tokens"):
        contrast(maps(0), maps(0)[..., :12])
    with pytest.raises(ValueError, match="steps must be"):
        fuse(maps(0), maps(1), GRID, SIZE, steps="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite"):
        keep_regions(torch.full((4, 4), math.nan))
    with pytest.raises(ValueError, match="fraction"):
        keep_regions(torch.rand(4, 4), fraction=0.0)
    with pytest.raises(ValueError, match="rank"):
        keep_regions(torch.rand(4, 4), rank="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no square"):
        square_grid(35)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    with pytest.raises(ImportError, match=r"needs the package 'scipy': pip install 'attnlab\[data\]'"):
        components(torch.ones(3, 3))
