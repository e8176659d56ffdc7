"""What a tiled kernel visits: equal to counting the blocks of the dense mask, and to published numbers."""

import math

import pytest
import torch

from attnlab.patterns import Axial, Blocks, Causal, Dilated, Halo, Neighborhood, Sinks, Window
from attnlab.patterns.speedup import end_to_end, speedup, tile_pairs, visited_share, visits

# Grid, kernel, stride, query tile, key tile; static, dynamic and FLOP-wise speed-up. The FLOP-wise ones stand in
# NATTEN's documentation (FLUX 4K and HunyuanVideo, arXiv 2504.16922); the others were computed apart, by its rule.
PUBLISHED = [
    ((256, 256), (80, 80), (1, 1), (16, 16), (16, 8), 7.06, 7.83, 10.24),
    ((256, 256), (80, 80), (16, 16), (16, 16), (16, 8), 10.24, 10.24, 10.24),
    ((30, 48, 80), (18, 24, 24), (1, 1, 1), (4, 8, 8), (2, 8, 8), 5.24, 6.62, 11.11),
    ((30, 48, 80), (18, 24, 24), (16, 8, 8), (4, 8, 8), (2, 8, 8), 11.11, 11.11, 11.11),
    ((32768,), (2048,), (1,), (256,), (128,), 14.32, 14.32, 16.0),
    ((32768,), (2048,), (256,), (256,), (128,), 16.0, 16.0, 16.0),
]


@pytest.mark.parametrize(("grid", "kernel", "stride", "q_tile", "kv_tile", "static", "dynamic", "flops"), PUBLISHED)
def test_the_published_speedups(grid, kernel, stride, q_tile, kv_tile, static, dynamic, flops):
    pattern = Neighborhood(grid, kernel, 1, stride)
    found = speedup(pattern, q_tile, kv_tile)
    assert found.ideal == pytest.approx(flops, abs=0.005)
    assert found.reachable == pytest.approx(static, abs=0.006)
    assert speedup(pattern, q_tile, kv_tile, dynamic=True).reachable == pytest.approx(dynamic, abs=0.006)
    assert found.perfect == (max(stride) > 1)
    # What a perfect case still wastes are the queries that fill up the last tile.
    padded = math.prod(-(-n // t) * t for n, t in zip(grid, q_tile, strict=True))
    assert (found.wasted == pytest.approx(1 - math.prod(grid) / padded, abs=1e-12)) == found.perfect


def boxes(grid, tile, step):
    """Every token's box and residue, as one number per box in row-major order of (residue, box) per axis."""
    coordinates = torch.unravel_index(torch.arange(math.prod(grid)), grid)
    number = torch.zeros(math.prod(grid), dtype=torch.long)
    count = 1
    for at, length, t, d in zip(coordinates, grid, tile, step, strict=True):
        sizes = [-(-len(range(r, length, d)) // t) for r in range(d)]
        first = torch.tensor([0, *sizes]).cumsum(0)
        number = number * int(first[-1]) + first[at % d] + at // d // t
        count *= int(first[-1])
    return number, count


def brute_force(pattern, q_tile, kv_tile):
    """Full and partial blocks of the dense mask, tokens put in their boxes; padded queries repeat, padded keys mask."""
    n = math.prod(pattern.grid)
    mask = pattern.matrix(n)
    step = [pattern.step(a) for a in range(len(pattern.grid))]
    (rows, row_count), (columns, column_count) = (boxes(pattern.grid, t, step) for t in (q_tile, kv_tile))
    full, partial = torch.zeros(row_count, dtype=torch.long), torch.zeros(row_count, dtype=torch.long)
    for i in range(row_count):
        for j in range(column_count):
            block = mask[rows == i][:, columns == j]
            if bool(block.any()):
                complete = bool(block.all()) and block.shape[1] == math.prod(kv_tile)
                (full if complete else partial)[i] += 1
    return full, partial


@pytest.mark.parametrize(
    ("pattern", "q_tile", "kv_tile"),
    [
        (Neighborhood((17,), 5), (4,), (3,)),
        (Neighborhood((16,), 8, 1, 4), (4,), (4,)),
        (Neighborhood((19,), 4, 3), (2,), (3,)),
        (Neighborhood((20,), 6, 1, 3, True), (4,), (2,)),
        (Neighborhood((8, 10), (4, 5), 1, (2, 1)), (2, 4), (4, 2)),
        (Neighborhood((9, 8), (3, 4), (2, 1), (1, 2), (True, False)), (3, 2), (2, 4)),
        (Neighborhood((4, 6, 4), (2, 3, 4), 1, (2, 1, 2)), (2, 2, 2), (2, 3, 2)),
        (Blocks((12, 8), (4, 8)), (2, 4), (4, 4)),
        (Halo((12,), 4, 2), (4,), (2,)),
        (Axial((6, 8), 1), (2, 4), (3, 2)),
    ],
    ids=str,
)
def test_counts_are_those_of_the_dense_masks_blocks(pattern, q_tile, kv_tile):
    found = visits(pattern, q_tile, kv_tile)
    full, partial = brute_force(pattern, q_tile, kv_tile)
    assert torch.equal(found.full, full) and torch.equal(found.partial, partial)


@pytest.mark.parametrize(
    ("grid", "kernel", "stride", "causal", "tile"),
    [
        ((13,), (5,), (2,), (True,), (4,)),
        ((14,), (6,), (4,), (False,), (4,)),
        ((10, 7), (4, 3), (3, 1), (False, True), (4, 2)),
        ((9, 14), (9, 8), (1, 4), (False, False), (2, 4)),
    ],
)
def test_counts_are_those_of_nattens_own_block_mask_for_ragged_grids(grid, kernel, stride, causal, tile):
    flex = pytest.importorskip("natten.backends.flex")
    padded = tuple(-(-n // t) * t for n, t in zip(grid, tile, strict=True))
    mask = flex.get_na_flex_mask(
        "cpu", len(grid), grid, kernel, stride, (1,) * len(grid), causal,
        q_tile_shape=tile, kv_tile_shape=tile, q_shape=padded, kv_shape=padded,
    )  # fmt: skip
    found = visits(Neighborhood(grid, kernel, 1, stride, causal), tile, tile)
    assert found.partial.tolist() == mask.kv_num_blocks.flatten().tolist()
    assert found.full.tolist() == mask.full_kv_num_blocks.flatten().tolist()


@pytest.mark.parametrize(
    ("pattern", "nq", "nk"),
    [(Window(9), 40, 40), (Causal(), 33, 50), (Window(5) | Sinks(3), 41, 41), (Dilated(3), 30, 30)],
    ids=str,
)
def test_runs_of_any_pattern_are_counted_from_its_mask(pattern, nq, nk):
    mask, pairs = pattern.matrix(nq, nk), tile_pairs(pattern, 8, 4, nq, nk)
    for i in range(-(-nq // 8)):
        rows = mask[torch.arange(8 * i, 8 * i + 8).clamp_max(nq - 1)]
        assert pairs[i].tolist() == [int(block.sum()) for block in rows.split(4, 1)]
    found = speedup(pattern, 8, 4, nq=nq, nk=nk)
    assert found.visited == int((pairs > 0).sum()) and found.possible == pairs.numel()
    assert found.ideal == pytest.approx(nq * nk / int(mask.sum()))


def test_a_dilated_grid_in_runs_as_they_lie_visits_far_more_than_in_boxes():
    pattern = Neighborhood((64,), 8, 8)
    assert speedup(pattern, (8,), (8,)).reachable == 8.0 and speedup(pattern, 8, 8).reachable == 1.0


def evenly_blocked(length, kernel, stride, q_tile, kv_tile):
    """The test for a case without masks of arXiv 2504.16922, for one axis that is not causal."""
    if kernel == length:
        return True
    last = (length - 1) // stride * stride
    start = min(max(min(last + stride // 2, length - 1) - kernel // 2, 0), length - kernel)
    return (
        stride % q_tile == 0
        and kernel % kv_tile == 0
        and (length % stride == 0 or start % kv_tile == 0)
        and (kernel // 2 - stride // 2) % kv_tile == 0
        and (length - kernel) % kv_tile == 0
    )


def test_cases_that_the_rule_calls_perfect_need_no_mask():
    perfect = 0
    for length in (16, 24, 20):
        for kernel in range(4, length + 1, 4):
            for stride in (s for s in (1, 2, 4, 8) if s <= kernel):
                for q_tile, kv_tile in ((4, 4), (2, 4), (4, 2), (8, 4)):
                    if kernel < length and evenly_blocked(length, kernel, stride, q_tile, kv_tile):
                        perfect += 1
                        found = speedup(Neighborhood((length,), kernel, 1, stride), (q_tile,), (kv_tile,))
                        assert found.perfect, (length, kernel, stride, q_tile, kv_tile)
    assert perfect > 10
    # The window's centre must fall on a tile's edge too: 12 does, 8 does not (both with stride 4 and tiles of 4).
    assert speedup(Neighborhood((24,), 12, 1, 4), (4,), (4,)).perfect
    assert not speedup(Neighborhood((16,), 8, 1, 4), (4,), (4,)).perfect
    assert not speedup(Neighborhood((24,), 12, 1, 4, True), (4,), (4,)).perfect


def test_longer_strides_never_visit_more_and_the_whole_grid_gains_nothing():
    visited = [speedup(Neighborhood((64,), 32, 1, s), (8,), (8,)).visited for s in (1, 2, 4, 8, 16, 32)]
    assert visited == sorted(visited, reverse=True) and visited[0] > visited[-1]
    whole = speedup(Neighborhood((12, 8), (12, 8)), (4, 4))
    assert whole.ideal == whole.reachable == 1.0 and whole.perfect


def test_dynamic_tiles_begin_where_the_window_does():
    # Windows of 4 starting anywhere: one dynamic tile of 4 for a query on its own, up to two static ones.
    pattern = Neighborhood((16,), 4)
    assert visits(pattern, (1,), (4,), dynamic=True).total == 16
    assert visits(pattern, (1,), (4,)).total == 16 + 9
    runs = visits(Window(4), 1, 4, nq=16, dynamic=True)
    assert runs.total == 16 and int(runs.full.sum()) == 13  # the first three queries see fewer than four keys


def test_the_estimate_from_a_sample_is_close():
    exact = speedup(Window(256), 128, 128, nq=8192)
    assert visited_share(Window(256), 8192, 8192) == pytest.approx(1 / exact.reachable, rel=0.05)
    assert visited_share(Causal(), 8192, 8192) == pytest.approx(0.5, abs=0.02)


def test_amdahl():
    assert end_to_end(0.5, 2.0) == pytest.approx(4 / 3)
    assert end_to_end(1.0, 4.0, steps=0.75) == pytest.approx(1 / (0.25 + 0.75 / 4))
    assert end_to_end(0.0, 10.0) == 1.0
    with pytest.raises(ValueError, match="share and steps must lie in"):
        end_to_end(1.5, 2.0)


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError, match="nq must be given for a pattern without a grid"):
        speedup(Window(4), 8, 8)
    with pytest.raises(ValueError, match="must be integers for a pattern without a grid"):
        speedup(Window(4), (8,), (8,), nq=16)
    with pytest.raises(ValueError, match="q_tile must be one integer or one for each of the 2 axes"):
        speedup(Neighborhood((8, 8), 3), (2, 2, 2), (2, 2))
    with pytest.raises(ValueError, match="kv_tile must be positive, got 0"):
        speedup(Window(4), 8, 0, nq=16)
    with pytest.raises(ValueError, match="stride must be at most kernel"):
        speedup(Neighborhood((8,), 3, 1, 4), (2,), (2,))


def test_it_says_what_it_found():
    assert str(speedup(Neighborhood((24,), 12, 1, 4), (4,), (4,))) == (
        "2× of at most 2×: visits 18 of 36 tiles, no mask needed"
    )
    assert "masked" in str(speedup(Neighborhood((24,), 12), (4,), (4,)))
