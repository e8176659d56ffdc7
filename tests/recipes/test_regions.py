"""Labelled regions: alignment, attention by distance, the multi-instance loss, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.models.vision.dynamicvis import DynamicVis
from attnlab.recipes import regions
from attnlab.recipes.regions import (
    FeaturePyramid,
    RegionPretraining,
    WhereAttention,
    gather_regions,
    multi_instance_loss,
    region_align,
)


def test_the_loss_sums_the_probabilities_of_all_regions_of_a_category() -> None:
    f, e, labels = torch.randn(5, 4).double(), torch.randn(6, 4).double(), torch.tensor([0, 2, 2, 5, 0])
    z = 3.0 * (f / f.norm(dim=1, keepdim=True)) @ (e / e.norm(dim=1, keepdim=True)).T
    one = torch.stack([-z[i].softmax(0)[labels[i]].log() for i in range(5)]).mean()
    other = torch.stack([-z[:, k].softmax(0)[labels == k].sum().log() for k in (0, 2, 5)]).mean()
    torch.testing.assert_close(multi_instance_loss(f, e, labels, scale=3.0, weight=0.8), 0.4 * (one + other))


def bilinear(m: Tensor, y: float, x: float) -> Tensor:
    y, x = min(max(y, 0.0), m.shape[1] - 1.0), min(max(x, 0.0), m.shape[2] - 1.0)
    top, left = int(y), int(x)
    low, right = min(top + 1, m.shape[1] - 1), min(left + 1, m.shape[2] - 1)
    v, u = y - top, x - left
    above, below = torch.lerp(m[:, top, left], m[:, top, right], u), torch.lerp(m[:, low, left], m[:, low, right], u)
    return torch.lerp(above, below, v)


def test_regions_are_means_of_bilinear_samples() -> None:
    maps = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    boxes = [torch.tensor([[3.0, 5.0, 21.0, 17.0], [0.0, 0.0, 32.0, 24.0]]), torch.tensor([[8.5, 1.0, 11.0, 22.0]])]
    found = region_align(maps, boxes, 4, size=3)
    which = [(0, boxes[0][0]), (0, boxes[0][1]), (1, boxes[1][0])]
    for region, (image, box) in zip(found, which, strict=True):
        left, top, right, bottom = (box / 4).tolist()
        for i, j in ((0, 0), (1, 2), (2, 1)):
            cells = [
                bilinear(
                    maps[image], top + (bottom - top) * (i + a) / 3 - 0.5, left + (right - left) * (j + b) / 3 - 0.5
                )
                for a in (0.25, 0.75)
                for b in (0.25, 0.75)
            ]
            torch.testing.assert_close(region[:, i, j], torch.stack(cells).mean(0))
    none = torch.zeros(0, 4)
    assert region_align(maps, [none, boxes[1]], 4).shape == (1, 3, 7, 7)
    assert region_align(maps, [none, none], 4).shape == (0, 3, 7, 7)


def test_attention_asks_by_distance_alone() -> None:
    m = WhereAttention(8, heads=2).double()
    nn.init.ones_(m.gamma)
    x = torch.randn(1, 8, 3, 5, dtype=torch.float64)
    q = m.query(x[0].permute(1, 2, 0)).unflatten(-1, (2, 4))
    v = m.value(x[0].permute(1, 2, 0)).unflatten(-1, (2, 4))

    def far(distance: int, project: nn.Linear) -> Tensor:
        angles = [distance / 1000 ** (k / 2) for k in range(2)]
        return project(torch.tensor([f(a) for f in (math.sin, math.cos) for a in angles]).double()).unflatten(0, (2, 4))

    out = torch.zeros(3, 5, 2, 4, dtype=torch.float64)
    keys = [(i, j) for i in (0, 2) for j in (0, 2, 4)]
    for i in range(3):
        for j in range(5):
            scores = [(q[i, j] * (far(j - b, m.across) + far(i - a, m.down))).sum(-1) / math.sqrt(2) for a, b in keys]
            weights = torch.stack(scores).softmax(0)
            out[i, j] = sum(w[:, None] * v[a, b] for w, (a, b) in zip(weights, keys, strict=True))
    torch.testing.assert_close(m(x), x + m.wo(out.flatten(2)).permute(2, 0, 1)[None])


def test_finer_maps_learn_what_the_coarser_know() -> None:
    pyramid = FeaturePyramid((4, 6), 8)
    maps = [torch.randn(1, 4, 7, 9), torch.randn(1, 6, 4, 5)]
    fine = pyramid.lateral[0](maps[0]) + F.interpolate(pyramid.lateral[1](maps[1]), size=(7, 9))
    torch.testing.assert_close(pyramid(maps)[0], pyramid.smooth[0](fine))


def test_regions_of_all_processes_are_gathered_and_own_ones_keep_their_gradient(monkeypatch) -> None:
    own, labels = torch.randn(2, 4, requires_grad=True), torch.tensor([1, 0])
    assert gather_regions(own, labels) == (own, labels)
    theirs = (torch.randn(3, 4), torch.tensor([2, 2, 1]))

    def gather(found, mine):
        found[0], found[1] = theirs, mine

    for name, value in {
        "is_initialized": lambda: True, "get_world_size": lambda: 2, "get_rank": lambda: 1, "all_gather_object": gather,
    }.items():  # fmt: skip
        monkeypatch.setattr(regions.dist, name, value)
    features, every = gather_regions(own, labels)
    assert every.tolist() == [2, 2, 1, 1, 0] and torch.equal(features[:3], theirs[0])
    features.sum().backward()
    assert torch.equal(own.grad, torch.ones(2, 4))


def make(classes: int = 2) -> RegionPretraining:
    torch.manual_seed(0)
    backbone = DynamicVis(dims=(8, 12, 16, 16), depths=(1, 1, 1, 1), states=2, image=64, num_classes=0)
    return RegionPretraining(backbone, classes=classes, width=16, heads=2)


def scenes(count: int, rng: torch.Generator) -> tuple[Tensor, list[Tensor], Tensor]:
    """Dark pictures, 64 pixels wide, with an object of 8 pixels that is red or blue, and one more somewhere."""
    x, labels = 0.1 * torch.randn(count, 3, 64, 64, generator=rng), torch.randint(2, (count,), generator=rng)
    boxes = []
    for one, label in zip(x, labels.tolist(), strict=True):
        a, b, c, d = (4 * torch.randint(0, 14, (4,), generator=rng)).tolist()
        one[1, c : c + 8, d : d + 8] += 1.5
        one[2 * label, a : a + 8, b : b + 8] += 1.5
        boxes.append(torch.tensor([[b, a, b + 8, a + 8]]).float())
    return x, boxes, labels


def test_learns_what_is_in_the_boxes() -> None:
    net, rng = make(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(30):
        x, boxes, labels = scenes(8, rng)
        loss = net.loss(x, boxes, [labels])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [n for n, p in net.named_parameters() if p.grad is None and "pooled_norm" not in n] == []
    x, boxes, labels = scenes(48, rng)
    with torch.no_grad():
        assert (net.eval()(x, boxes).argmax(1) == labels).float().mean() > 0.9


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RegionPretraining(nn.Linear(2, 2), classes=2), TypeError, "backbone must give maps"),
        (lambda: WhereAttention(6), ValueError, "dim must be a multiple of 4"),
        (lambda: region_align(torch.zeros(2, 3, 4, 4), [torch.zeros(1, 4)], 4), ValueError, "boxes must be 2 tensors"),
        (lambda: multi_instance_loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2)), ValueError, "features mus"),
        (lambda: multi_instance_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3)), ValueError, "labels must"),
    ],
)
def test_errors_name_what_is_wrong(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
