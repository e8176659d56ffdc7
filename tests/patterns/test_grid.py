"""Grid patterns: NATTEN's border rule against its own masks, blocks, halos, axes, and what each refuses."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attnlab.patterns import Around, Axial, Blocks, Halo, Neighborhood, SoFar

GOLDENS = sorted((Path(__file__).parents[1] / "goldens" / "na").glob("*.json"))


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.stem)
def test_neighborhood_is_nattens_own_mask(path):
    arguments = json.loads(path.read_text())["arguments"]
    tensors = load_file(path.with_suffix(".safetensors"))
    grid = tuple(tensors["in.q"].shape[1:-2])
    names = {"kernel_size": "kernel", "dilation": "dilation", "stride": "stride", "is_causal": "causal"}
    given = {names[n]: tuple(v) if isinstance(v, list) else v for n, v in arguments.items() if n in names}
    tokens = math.prod(grid)
    mask = tensors["out.mask"][:, :tokens].bool()
    assert torch.equal(Neighborhood(grid, **given).matrix(tokens), mask)


def _sees(i, j, length, kernel, dilation, stride, causal):
    """One axis of NATTEN's rule, in plain integers (arXiv 2504.16922)."""
    if i % dilation != j % dilation:
        return False
    p, t, n = i // dilation, j // dilation, len(range(i % dilation, length, dilation))
    if causal:
        leader = min(p // stride * stride + stride - 1, n - 1)
        return max(leader - kernel + 1, 0) <= t <= p
    leader = min(p // stride * stride + stride // 2, n - 1)
    start = min(max(leader - kernel // 2, 0), n - kernel)
    return start <= t < start + kernel


@pytest.mark.parametrize("length", [5, 12, 13])
def test_neighborhood_follows_the_written_rule_on_every_small_axis(length):
    for kernel, dilation, causal in itertools.product(range(1, length + 1), range(1, 4), (False, True)):
        for stride in range(1, kernel + 1) if kernel * dilation <= length else ():
            seen = Neighborhood((length,), kernel, dilation, stride, causal).matrix(length)
            rule = [
                [_sees(i, j, length, kernel, dilation, stride, causal) for j in range(length)] for i in range(length)
            ]
            assert torch.equal(seen, torch.tensor(rule)), (kernel, dilation, stride, causal)


def test_neighborhood_in_three_dimensions_is_the_product_of_its_axes():
    grid, kernel, dilation, stride, causal = (4, 5, 6), (2, 5, 3), (2, 1, 2), (1, 3, 2), (False, True, False)
    axes = [
        Neighborhood((n,), k, d, s, c).matrix(n)
        for n, k, d, s, c in zip(grid, kernel, dilation, stride, causal, strict=True)
    ]
    product = torch.einsum("ad,be,cf->abcdef", *(a.int() for a in axes)).reshape(120, 120).bool()
    assert torch.equal(Neighborhood(grid, kernel, dilation, stride, causal).matrix(120), product)


def test_the_window_never_shrinks_at_the_border():
    assert (Neighborhood((9, 11), (4, 5), dilation=(2, 1)).matrix(99).sum(1) == 20).all()


def test_a_kernel_of_the_whole_grid_is_full_attention_and_one_of_the_stride_is_blocks():
    assert Neighborhood((4, 6), (4, 6)).matrix(24).all()
    blocked = Neighborhood((8, 12), (4, 3), stride=(4, 3)).matrix(96)
    assert torch.equal(blocked, Blocks((8, 12), (4, 3)).matrix(96))


def test_shifted_blocks_are_swins_mask():
    height, width, size, shift = 8, 12, 4, 2
    # Swin: roll the map back by `shift`, cut windows, and forbid pairs that were not neighbours before the roll.
    region = torch.zeros(height, width)
    spans = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate(itertools.product(spans, spans)):
        region[rows, columns] = number
    window = (torch.arange(height)[:, None] // size) * width + torch.arange(width) // size
    labels = (window * 9 + region).roll((shift, shift), (0, 1)).flatten()
    expected = labels[:, None] == labels
    assert torch.equal(Blocks((height, width), size, shift).matrix(height * width), expected)


def test_a_halo_is_a_block_that_sees_further():
    seen = Halo((6, 9), block=3, halo=1).matrix(54).view(6, 9, 6, 9)
    assert torch.equal(seen[4, 4].nonzero().amin(0), torch.tensor([2, 2]))
    assert torch.equal(seen[4, 4].nonzero().amax(0), torch.tensor([5, 6]))
    assert torch.equal(Halo((6, 9), 3, 0).matrix(54), Blocks((6, 9), 3).matrix(54))


def test_a_convolutions_window_shrinks_at_the_border():
    seen = Around((6, 9), kernel=(3, 5), dilation=(2, 1)).matrix(54).view(6, 9, 6, 9)
    inside = seen[3, 4].nonzero()
    assert inside[:, 0].unique().tolist() == [1, 3, 5] and inside[:, 1].unique().tolist() == [2, 3, 4, 5, 6]
    assert seen[0, 0].sum() == 2 * 3
    assert torch.equal(Around((5, 7), 1).matrix(35), torch.eye(35, dtype=torch.bool))
    assert torch.equal(Around((5, 7), 3).matrix(35), Halo((5, 7), 1, 1).matrix(35))


def test_axial_lines_meet_only_at_the_query():
    rows, columns = Axial((5, 7), 1).matrix(35), Axial((5, 7), -2).matrix(35)
    assert (rows.sum(1) == 7).all() and (columns.sum(1) == 5).all()
    assert torch.equal(rows & columns, torch.eye(35, dtype=torch.bool))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Neighborhood((5, 9), 7), "kernel must fit the grid, got 7 on axis 0 of length 5"),
        (lambda: Neighborhood((14,), 5, dilation=3), "kernel · dilation must fit the grid, got 5 · 3 on axis 0"),
        (lambda: Neighborhood((14,), 5, stride=6), "stride must be at most kernel, got 6 and 5"),
        (lambda: Neighborhood((8, 8), (3, 3, 3)), "kernel must be one integer or one for each of the 2 axes"),
        (lambda: Neighborhood((8, 8), 0), "kernel must be integers of at least 1, got 0"),
        (lambda: Neighborhood((8,), 3, causal=1), "causal must be one bool"),
        (lambda: Blocks((), 2), "grid must have at least one axis"),
        (lambda: Blocks((8,), 2, shift=-1), "shift must be integers of at least 0"),
        (lambda: Around((8, 8), 4), "kernel must be odd on every axis"),
        (lambda: Axial((4, 4), 2), "axis must be one of the 2 axes"),
        (lambda: Neighborhood((4, 4), 3).check(15, 15), "grid 4 × 4 holds 16 tokens, but there are 15 queries"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_patterns_compare_by_what_they_say():
    assert Neighborhood((8, 8), 3) == Neighborhood((8, 8), (3, 3)) != Neighborhood((8, 8), 5)
    assert hash(Blocks([8, 8], 4)) == hash(Blocks((8, 8), (4, 4)))


@pytest.mark.parametrize("grid", [(13,), (7, 9), (4, 5, 6)])
def test_tiles_hold_every_query_once_and_their_boxes_every_key(grid):
    tokens = math.prod(grid)
    neighborhoods = Neighborhood(grid, 3), Neighborhood(grid, 2, 2)
    for pattern in (*neighborhoods, Blocks(grid, 3, 1), Halo(grid, 2, 1), Around(grid, 3, 2), Axial(grid, 0)):
        tiles = pattern.query_tiles(tokens)
        assert torch.equal(tiles[tiles >= 0].sort().values, torch.arange(tokens))
        seen = pattern.matrix(tokens)
        for queries in tiles:
            queries = queries[queries >= 0]
            keys = pattern.tile_keys(queries[None], tokens)[0]
            missed = seen[queries].any(0)
            missed[keys[keys >= 0]] = False
            assert not missed.any()


def test_shifted_blocks_can_be_seen_from_a_later_query() -> None:
    blocks = Blocks((4, 4), size=2, shift=1)
    assert torch.equal(blocks.starting_at(5).matrix(11, 16), blocks.matrix(16)[5:])


@pytest.mark.parametrize("pattern", [Axial((3, 4), 0), Neighborhood((3, 4), 2, causal=True)], ids=["axial", "causal"])
def test_a_grid_so_far_is_the_first_of_its_queries_and_keys(pattern) -> None:
    whole = pattern.matrix(12)
    assert torch.equal(SoFar(pattern).matrix(7), whole[:7, :7])
    assert torch.equal(SoFar(pattern).starting_at(5).matrix(2, 7), whole[5:7, :7])
    with pytest.raises(ValueError, match="grid 3 × 4 holds 12 tokens"):
        SoFar(pattern).matrix(13)
