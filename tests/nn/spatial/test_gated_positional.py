"""Gated positional attention: the paper's equations in full, its two limits, and the start as a convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.gated_positional import GatedPositionalAttention, mean_distance


def oracle(m: GatedPositionalAttention, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """All N² positional logits and both softmaxes written out, weights divided by their sum."""
    height, width = grid
    y, c = torch.arange(height * width) // width, torch.arange(height * width) % width
    dx, dy = ((t - t[:, None]).double() for t in (c, y))
    positional = m.position_logits(torch.stack((dx, dy, dx**2 + dy**2), -1)).permute(2, 0, 1).softmax(-1)
    q, k, v = (t.transpose(1, 2) for t in m.wqkv(x).unflatten(-1, (3, m.heads, -1)).unbind(2))
    content = (torch.einsum("bhqd,bhkd->bhqk", q, k) * m.head_dim**-0.5).softmax(-1)
    gate = torch.sigmoid(m.gate)[:, None, None]
    weights = (1 - gate) * content + gate * positional
    weights = weights / weights.sum(-1, keepdim=True)
    return m.wo((weights @ v).transpose(1, 2).flatten(2))


def shaken(heads: int, dim: int = 12) -> GatedPositionalAttention:
    m = GatedPositionalAttention(dim, heads=heads, bias=True).double()
    for p in m.parameters():
        nn.init.normal_(p, std=0.5)
    return m


@pytest.mark.parametrize(("grid", "heads"), [((3, 3), 4), ((4, 2), 3), ((1, 5), 1)])
def test_equals_the_equations_written_out(grid: tuple[int, int], heads: int) -> None:
    m, x = shaken(heads), torch.randn(2, grid[0] * grid[1], 12, dtype=torch.float64)
    torch.testing.assert_close(m(x, grid=grid), oracle(m, x, grid))


def test_the_written_out_weights_are_those_of_the_layer_and_sum_to_one() -> None:
    m, x = shaken(4), torch.randn(2, 6, 12, dtype=torch.float64)
    weights = m.weights(x, grid=(2, 3))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6, dtype=torch.float64))
    torch.testing.assert_close(m.merge(weights @ m.qkv(x)[2]), m(x, grid=(2, 3)))


def test_dropout_drops_weights_in_training_alone() -> None:
    m, x = GatedPositionalAttention(8, heads=2, dropout=0.5), torch.randn(1, 6, 8)
    assert not torch.equal(m(x, grid=(2, 3)), m(x, grid=(2, 3)))
    m.eval()
    assert torch.equal(m(x, grid=(2, 3)), m(x, grid=(2, 3)))


def test_with_closed_gates_it_is_plain_attention() -> None:
    m, plain = shaken(3), MultiHead(12, heads=3, bias=True).double()
    plain.load_state_dict({n: p for n, p in m.state_dict().items() if n.startswith("w")})
    nn.init.constant_(m.gate, -1e3)
    x = torch.randn(2, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(m(x, grid=(2, 4)), plain(x))


@pytest.mark.parametrize("side", [3, 2])
def test_sharp_and_wide_open_it_is_a_convolution(side: int) -> None:
    """A kernel of `side`² taps with any weights: head (p, q) carries one tap, Wo mixes channels as the kernel does."""
    heads, dim, size = side**2, 2 * side**2, 6
    m = GatedPositionalAttention(dim, heads=heads, locality=50.0).double()
    nn.init.constant_(m.gate, 1e3)
    # Values: head h holds channels 2h, 2h+1 of the map's first two channels, so each head sees the same two.
    values = torch.zeros(dim, dim, dtype=torch.float64)
    for head in range(heads):
        values[2 * head, 0] = values[2 * head + 1, 1] = 1.0
    m.wqkv.weight.data[2 * dim :] = values
    kernel = torch.randn(dim, 2, side, side, dtype=torch.float64)  # out, in, row, column
    # Head p + side·q stands q columns and p rows into the kernel.
    taps = kernel.permute(0, 3, 2, 1).flatten(1)
    m.wo.weight.data = taps
    nn.init.zeros_(m.wo.bias)
    maps = torch.randn(1, dim, size, size, dtype=torch.float64)
    found = m(maps.flatten(2).transpose(1, 2), grid=(size, size)).transpose(1, 2).unflatten(2, (size, size))
    if side % 2:
        wanted = F.conv2d(maps[:, :2], kernel, padding=side // 2)
        torch.testing.assert_close(found[:, :, 1:-1, 1:-1], wanted[:, :, 1:-1, 1:-1])
    else:
        # An even kernel has its centre between places: each tap is shared by the places around it, 2 × 2 equally.
        wanted = F.conv2d(F.avg_pool2d(maps[:, :2], 2, 1), kernel)
        torch.testing.assert_close(found[:, :, 1:-1, 1:-1], wanted)


def test_each_head_begins_at_its_offset() -> None:
    m = GatedPositionalAttention(18, heads=9, locality=50.0)
    rows, columns = m.position_weights((5, 5))
    looks = [(int(rows[h, 2].argmax()) - 2, int(columns[h, 2].argmax()) - 2) for h in range(9)]
    assert looks == [(down, across) for across in (-1, 0, 1) for down in (-1, 0, 1)]


def test_positional_weights_do_not_depend_on_where_the_query_stands() -> None:
    m = GatedPositionalAttention(18, heads=9)
    rows, _ = m.position_weights((41, 3))
    torch.testing.assert_close(rows[:, 20, 10:31], rows[:, 21, 11:32])


def test_the_distance_of_a_look_grows_as_heads_leave_their_neighbourhood() -> None:
    m, x = GatedPositionalAttention(18, heads=9), torch.randn(1, 49, 18)
    near = m.non_locality(x, grid=(7, 7))
    nn.init.constant_(m.gate, -10.0)
    assert (m.non_locality(x, grid=(7, 7)) > near + 0.5).all()
    one_step_right = torch.zeros(1, 1, 3, 3)
    one_step_right[0, 0, :, 2] = 1.0
    torch.testing.assert_close(mean_distance(one_step_right, (1, 3)), torch.tensor([1.0]))


def test_the_bias_that_the_softmax_cancels_is_not_trained() -> None:
    m = GatedPositionalAttention(8, heads=2)
    assert not m.position_logits.bias.requires_grad and "position_logits.bias" in m.state_dict()


def test_bad_arguments_are_named() -> None:
    m = GatedPositionalAttention(8, heads=2)
    with pytest.raises(ValueError, match="grid must be given"):
        m(torch.randn(1, 4, 8))
    with pytest.raises(ValueError, match="grid must multiply"):
        m(torch.randn(1, 4, 8), grid=(3, 2))
    with pytest.raises(ValueError, match="context"):
        m(torch.randn(1, 4, 8), torch.randn(1, 4, 8), grid=(2, 2))
    with pytest.raises(ValueError, match="causal must be False"):
        GatedPositionalAttention(8, heads=2, causal=True)
