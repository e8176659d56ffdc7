"""The answers are the colours on the grid, and a reader is a decoder that can be steered."""

from __future__ import annotations

import torch

from attnlab.lens import ConcentricPositions, steer
from attnlab.lens.toys.grid_recall import GridRecall


def test_the_answers_are_the_colours_of_the_shapes_in_their_cells():
    task = GridRecall(side=6, shapes=5, questions=3)
    grid = task.draw(40, torch.Generator().manual_seed(0))
    assert torch.equal(grid.kinds.gather(1, grid.cells), 1 + grid.asked)
    assert torch.equal(grid.tints.gather(1, grid.cells), grid.answers)
    assert ((grid.kinds > 0).sum(1) == 5).all() and task.image().sum() == 36


def test_a_reader_is_steered_like_the_decoder_of_a_large_model(transformers):
    task = GridRecall(side=4, shapes=4, questions=2)
    reader, grid = task.reader(dim=32).eval(), task.draw(3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = reader(grid)
        assert plain.shape == (3, 2, 6)
        with steer(reader, [ConcentricPositions((4, 4), task.image())]):
            assert (reader(grid) - plain).abs().max() > 1e-3
        assert torch.equal(reader(grid), plain)
    assert len(task.right(reader, bands=2, count=40)) == 2
