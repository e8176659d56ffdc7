"""Axial attention: the oracle is dense attention under the mask of each axis."""

import pytest
import torch

from attnlab.attend import attend
from attnlab.cost import count_flops
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.axial import AxialAttention, along
from attnlab.patterns import Axial, Causal


@pytest.mark.parametrize("combine", ["sum", "sequence"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grid", [(6,), (3, 5), (2, 3, 4)])
def test_equals_dense_attention_under_the_mask_of_each_axis(grid, causal, combine) -> None:
    m = AxialAttention(8, heads=2, axes=len(grid), combine=combine, causal=causal).double()
    x = torch.randn(2, torch.Size(grid).numel(), 8, dtype=torch.float64)
    wanted, total = x, torch.zeros_like(x)
    for axis, attention in enumerate(m.attentions):
        pattern = Axial(grid, axis) & Causal() if causal else Axial(grid, axis)
        q, k, v = attention.project(wanted if combine == "sequence" else x)
        wanted = attention.merge(attend(q, k, v, pattern=pattern))
        total = total + wanted
    torch.testing.assert_close(m(x, grid=grid), total if combine == "sum" else wanted)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_line_knows_nothing_of_other_lines(axis: int) -> None:
    attention = MultiHead(4, heads=2).double()
    maps = torch.randn(1, 2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(along(attention, maps, axis)[0, 1, 1, 1].sum(), maps)
    seen = gradient[0].abs().sum(-1) > 0
    line = torch.zeros(2, 3, 4, dtype=torch.bool)
    line[tuple(slice(None) if a == axis else 1 for a in range(3))] = True
    assert torch.equal(seen, line)


def test_two_layers_in_sequence_join_all_places() -> None:
    m = AxialAttention(4, heads=2, combine="sequence").double()
    x = torch.randn(1, 20, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(m(x, grid=(4, 5))[0, 7].sum(), x)
    assert (gradient[0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("grid", [(8, 8), (16, 4)])
def test_costs_projections_and_the_lengths_of_the_lines(grid) -> None:
    m, tokens, dim = AxialAttention(16, heads=2), grid[0] * grid[1], 16
    with torch.no_grad():
        found = count_flops(m, torch.randn(1, tokens, dim), grid=grid)
    assert found == 2 * 8 * tokens * dim**2 + 4 * tokens * dim * sum(grid)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="axes"):
        AxialAttention(8, heads=2, axes=0)
    with pytest.raises(ValueError, match="combine"):
        AxialAttention(8, heads=2, combine="mean")
    with pytest.raises(ValueError, match="grid must have 2 axes"):
        AxialAttention(8, heads=2)(torch.randn(1, 8, 8), grid=(2, 2, 2))


@pytest.mark.parametrize("combine", ["sum", "sequence"])
@pytest.mark.parametrize("grid", [(3, 5), (2, 3, 4)])
def test_streams_in_pieces_that_end_anywhere(grid, combine) -> None:
    torch.manual_seed(0)
    m = AxialAttention(8, heads=2, axes=len(grid), combine=combine, causal=True).double()
    x = torch.randn(2, torch.Size(grid).numel(), 8, dtype=torch.float64)
    state, out = m.initial_state(2), []
    with torch.no_grad():
        for piece in x.split([4, 1, 1, x.shape[1] - 6], 1):
            y, state = m(piece, grid=grid, state=state)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), m(x, grid=grid))


def test_a_state_stays_on_its_grid() -> None:
    m, x = AxialAttention(8, heads=2, causal=True), torch.randn(1, 6, 8)
    with torch.no_grad():
        _, state = m(x[:, :4], grid=(2, 3), state=m.initial_state(1))
    for part, grid, words in (
        (x[:, 4:], (3, 2), r"grid must stay \(2, 3\)"),
        (x, (2, 3), "grid must hold the 10 tokens of state and x"),
        (x[:, 4:], None, "grid must be given"),
    ):
        with pytest.raises(ValueError, match=words):
            m(part, grid=grid, state=state)
    with pytest.raises(ValueError, match="causal=True"):
        AxialAttention(8, heads=2).initial_state(1)
