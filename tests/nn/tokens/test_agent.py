"""Agent attention: its formula in full matrices, and what follows from it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.nn.tokens.agent import AgentAttention, AgentBias

GRID = (5, 6)


def tokens(m: AgentAttention, grid: tuple[int, int] = GRID, batch: int = 2) -> Tensor:
    return torch.randn(batch, int(m.class_token) + grid[0] * grid[1], m.dim, dtype=torch.float64)


def heads_of(m: AgentAttention, x: Tensor, grid: tuple[int, int] = GRID) -> Tensor:
    """Output of the heads by the definition: the N×N matrix that the two softmaxes imply, times the values."""
    broadcast, aggregate = m.factors(x, grid=grid)
    values = m.project(x, grid)[2].unflatten(-1, (m.heads, -1)).transpose(1, 2)
    return ((broadcast @ aggregate) @ values).transpose(1, 2).flatten(2)


def silence(m: AgentAttention) -> AgentAttention:
    """No convolution and an identity output projection: what is left are the heads."""
    with torch.no_grad():
        for p in m.local.parameters():
            p.zero_()
        m.wo.weight.copy_(torch.eye(m.dim))
        m.wo.bias.zero_()
    return m


@pytest.mark.parametrize("options", [{}, {"class_token": True}, {"reduction": 2, "grid": (4, 6)}, {"bias": False}])
def test_equals_linear_attention_with_two_softmaxes_as_feature_maps(options: dict) -> None:
    grid = options.get("grid", GRID)
    m = silence(AgentAttention(8, heads=2, agents=4, **{"grid": grid, **options}).double())
    x = tokens(m, grid)
    torch.testing.assert_close(m(x, grid=grid), heads_of(m, x, grid))


@pytest.mark.parametrize("first", [0, 1])
def test_the_convolution_of_the_values_is_added_to_the_places(first: int) -> None:
    m = AgentAttention(8, heads=2, agents=4, grid=GRID, class_token=bool(first)).double()
    x = tokens(m)
    values = m.wqkv(x)[:, first:, 16:].transpose(1, 2).unflatten(2, GRID)
    local = F.conv2d(values, m.local.weight, m.local.bias, padding=1, groups=8).flatten(2).transpose(1, 2)
    heads = heads_of(m, x)
    heads[:, first:] += local
    torch.testing.assert_close(m(x, grid=GRID), m.wo(heads))


def test_both_softmaxes_sum_to_one_so_constant_values_come_back() -> None:
    m = silence(AgentAttention(8, heads=2, agents=4, grid=GRID).double())
    torch.nn.init.zeros_(m.wqkv.weight[16:])
    x = tokens(m)
    torch.testing.assert_close(m(x, grid=GRID), m.wqkv.bias[16:].expand_as(x))


def test_the_implied_matrix_has_rank_at_most_the_number_of_agents() -> None:
    m = AgentAttention(32, heads=2, agents=4, grid=GRID).double()
    broadcast, aggregate = m.factors(tokens(m), grid=GRID)
    assert torch.linalg.matrix_rank(broadcast @ aggregate).max() == 4


def test_an_agent_for_every_token_is_still_not_softmax_attention() -> None:
    m = AgentAttention(8, heads=2, agents=16, grid=(4, 4)).double()
    for bias in (m.aggregate, m.broadcast):
        for table in bias.parameters():
            torch.nn.init.zeros_(table)
    x = tokens(m, (4, 4))
    broadcast, aggregate = m.factors(x, grid=(4, 4))
    q, k, _ = m.wqkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    softmax = (q @ k.transpose(-2, -1) / 2).softmax(-1)
    assert (broadcast @ aggregate - softmax).abs().max() > 1e-3


def test_without_biases_places_within_a_pooling_cell_are_interchangeable_and_across_cells_not() -> None:
    m = silence(AgentAttention(8, heads=2, agents=4, grid=(4, 4)).double())
    for bias in (m.aggregate, m.broadcast):
        for table in bias.parameters():
            torch.nn.init.zeros_(table)
    x = tokens(m, (4, 4))
    within, across = torch.arange(16), torch.arange(16)
    within[[0, 5]], across[[0, 15]] = torch.tensor([5, 0]), torch.tensor([15, 0])  # cells are 2×2
    y = m(x, grid=(4, 4))
    torch.testing.assert_close(m(x[:, within], grid=(4, 4)), y[:, within])
    assert (m(x[:, across], grid=(4, 4)) - y[:, across]).abs().max() > 1e-6


def test_agents_are_pooled_from_the_queries_before_scaling() -> None:
    m = AgentAttention(8, heads=2, agents=4, grid=(4, 4)).double()
    x = tokens(m, (4, 4))
    agents = m.project(x, (4, 4))[3]
    first = m.wqkv(x)[:, [0, 1, 4, 5], :8].mean(1).view(2, 2, 4)
    torch.testing.assert_close(agents[:, :, 0], first)


def test_biases_are_exact_on_their_own_grid_and_resized_on_others() -> None:
    bias = AgentBias(2, 4, (3, 5), coarse=2).double()
    coarse = F.interpolate(bias.coarse, size=(3, 5), mode="bilinear")
    torch.testing.assert_close(bias((3, 5))[0].unflatten(2, (3, 5)), coarse + bias.rows + bias.columns)
    assert bias((6, 10)).shape == (1, 2, 4, 60)
    for table in (bias.coarse, bias.rows, bias.columns):
        torch.nn.init.constant_(table, 1.0)
    torch.testing.assert_close(bias((7, 2)), torch.full((1, 2, 4, 14), 3.0, dtype=torch.float64))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="causal"):
        AgentAttention(8, heads=2, causal=True)
    with pytest.raises(ValueError, match="agents"):
        AgentAttention(8, heads=2, agents=8)
    with pytest.raises(ValueError, match="class_token"):
        AgentAttention(8, heads=2, class_token=True, reduction=2)
    with pytest.raises(ValueError, match="reduction"):
        AgentAttention(8, heads=2, agents=4, reduction=2)(torch.randn(1, 15, 8), grid=(3, 5))
    with pytest.raises(ValueError, match="grid"):
        AgentAttention(8, heads=2, class_token=True)(torch.randn(1, 16, 8), grid=(4, 4))
