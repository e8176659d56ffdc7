"""Attention as a convolution: the unfolded equations, what padding, shift and pooling do, and how far a stack sees."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.nn.spatial.convolutional import DIRECTIONS, ConvolutionalAttention, MSAConv


def unfolded(q: Tensor, k: Tensor, v: Tensor, kernel: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """One head on maps (B, D, H, W), every window written out."""
    padding = tuple(d * (n // 2) for n, d in zip(kernel, dilation, strict=True))
    k, v = (F.unfold(t, kernel, dilation, padding).view(*t.shape[:2], -1, *t.shape[2:]) for t in (k, v))
    weights = ((q[:, :, None] * k).sum(1) * q.shape[1] ** -0.5).softmax(1)
    return (weights[:, None] * v).sum(2)


def heads_of(m: ConvolutionalAttention, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of each head as maps."""
    maps = m.wqkv(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).unflatten(1, (3, m.heads, -1))
    return [tuple(maps[:, :, h].unbind(1)) for h in range(m.heads)]


def joined(m: ConvolutionalAttention, heads: list[Tensor]) -> Tensor:
    return m.wo(torch.cat(heads, 1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kernel", [3, (5, 1), 1])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_equals_the_unfolded_equations(kernel: int, dilation: int, heads: int) -> None:
    m = ConvolutionalAttention(8, heads=heads, kernel=kernel, dilation=dilation).double()
    x = 3 * torch.randn(2, 8, 5, 6, dtype=torch.float64)
    wanted = joined(m, [unfolded(*qkv, m.kernel, m.dilation) for qkv in heads_of(m, x)])
    torch.testing.assert_close(m(x), wanted)


def group(head: int, heads: int) -> tuple[int, int]:
    return DIRECTIONS[head * 4 // heads if heads >= 4 else head]


@pytest.mark.parametrize(("heads", "shift"), [(2, "qkv"), (4, "qkv"), (6, "kv"), (12, "qkv")])
def test_groups_of_heads_roll_up_down_left_and_right(heads: int, shift: str) -> None:
    m = ConvolutionalAttention(12, heads=heads, kernel=(5, 3), shift=shift).double()
    x = torch.randn(1, 12, 6, 7, dtype=torch.float64)
    wanted = []
    for head, (q, k, v) in enumerate(heads_of(m, x)):
        down, across = group(head, heads)
        by = (down * 2, across * 1)
        k, v = (t.roll(by, (2, 3)) for t in (k, v))
        if shift == "qkv":
            y = unfolded(q.roll(by, (2, 3)), k, v, m.kernel, m.dilation).roll((-by[0], -by[1]), (2, 3))
        else:
            y = unfolded(q, k, v, m.kernel, m.dilation)
        wanted.append(y)
    torch.testing.assert_close(m(x), joined(m, wanted))


def test_the_shift_changes_windows_at_the_border_alone() -> None:
    plain = ConvolutionalAttention(8, heads=4, kernel=3).double()
    rolled = ConvolutionalAttention(8, heads=4, kernel=3, shift="qkv").double()
    rolled.load_state_dict(plain.state_dict())
    x = torch.randn(1, 8, 9, 9, dtype=torch.float64)
    difference = (plain(x) - rolled(x)).abs().amax((0, 1))
    assert difference[2:-2, 2:-2].max() < 1e-12  # farther than ⌊k/2⌋ + ⌊k/2⌋ from every border
    assert difference[0].max() > 1e-3 and difference[:, -1].max() > 1e-3
    one = ConvolutionalAttention(8, heads=4, kernel=1, shift="qkv").double()  # ⌊1/2⌋ = 0: nothing rolls
    still = ConvolutionalAttention(8, heads=4, kernel=1).double()
    still.load_state_dict(one.state_dict())
    torch.testing.assert_close(one(x), still(x))


@pytest.mark.parametrize("inter_pool", ["kv_avg", "kv_max"])
@pytest.mark.parametrize(("size", "pool"), [((4, 6), 2), ((5, 7), 2), ((3, 4), 3)])
def test_pooled_keys_are_seen_around_the_querys_pooled_place(inter_pool: str, size: tuple[int, int], pool: int) -> None:
    m = ConvolutionalAttention(8, heads=2, kernel=3, inter_pool=inter_pool, pool=pool).double()
    x = torch.randn(1, 8, *size, dtype=torch.float64)
    wanted = []
    for q, k, v in heads_of(m, x):
        if inter_pool == "kv_max":
            k, v = (F.max_pool2d(t, pool, ceil_mode=True) for t in (k, v))
        else:
            k, v = (F.avg_pool2d(t, pool, ceil_mode=True, count_include_pad=False) for t in (k, v))
        y = torch.zeros_like(q)
        for i in range(size[0]):
            for j in range(size[1]):
                place = (slice(None), slice(None), slice(i // pool, i // pool + 1), slice(j // pool, j // pool + 1))
                everywhere = q[:, :, i : i + 1, j : j + 1].expand_as(k)
                y[:, :, i : i + 1, j : j + 1] = unfolded(everywhere, k, v, (3, 3), (1, 1))[place]
        wanted.append(y)
    torch.testing.assert_close(m(x), joined(m, wanted))


def test_pooled_tokens_are_mixed_and_repeated() -> None:
    m = ConvolutionalAttention(8, heads=2, kernel=3, inter_pool="tokens").double()
    plain = ConvolutionalAttention(8, heads=2, kernel=3).double()
    plain.load_state_dict(m.state_dict())
    x = torch.randn(1, 8, 4, 6, dtype=torch.float64)
    small = plain(F.avg_pool2d(x, 2))
    torch.testing.assert_close(m(x), small.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_a_constant_map_comes_out_smaller_where_padding_is_seen() -> None:
    m = ConvolutionalAttention(4, heads=1, kernel=3).double()
    with torch.no_grad():
        m.wqkv.weight.zero_()
        m.wqkv.bias.zero_()
        m.wqkv.bias[8:] = 1.0  # values are 1, all scores 0
        m.wo.weight.copy_(torch.eye(4))
        m.wo.bias.zero_()
    y = m(torch.randn(1, 4, 4, 5, dtype=torch.float64))[0, 0]
    torch.testing.assert_close(y[1:-1, 1:-1], torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(y[0, 1:-1], torch.full((3,), 6 / 9, dtype=torch.float64))
    assert y[0, 0].item() == pytest.approx(4 / 9)


def test_the_inside_of_a_crop_is_the_crop_of_the_inside() -> None:
    m = ConvolutionalAttention(8, heads=2, kernel=3).double()
    x = torch.randn(1, 8, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(m(x[:, :, 2:8, 2:8])[:, :, 1:-1, 1:-1], m(x)[:, :, 3:7, 3:7])


def seen(**keywords) -> int:
    """Places of a 16×16 map that the middle of two layers' output depends on."""
    torch.manual_seed(0)
    layers = [ConvolutionalAttention(8, heads=4, kernel=3).double(),
              ConvolutionalAttention(8, heads=4, kernel=3, **keywords).double()]  # fmt: skip
    x = torch.randn(1, 8, 16, 16, dtype=torch.float64, requires_grad=True)
    y = x
    for layer in layers:
        y = y + layer(y)
    y[0, :, 8, 8].sum().backward()
    return int((x.grad.abs().sum((0, 1)) > 0).sum())


def test_pooling_and_moved_windows_widen_the_view_and_the_cyclic_shift_joins_borders() -> None:
    assert seen() == 5 * 5
    assert seen(inter_pool="kv_avg") == 8 * 8  # three pooled places and the ring of the first layer
    assert seen(shift="kv") > 5 * 5
    assert seen(shift="qkv") == 5 * 5  # the middle is far from any border
    m = ConvolutionalAttention(8, heads=4, kernel=3, shift="qkv").double()
    x = torch.randn(1, 8, 16, 16, dtype=torch.float64, requires_grad=True)
    m(x)[0, :, 8, 0].sum().backward()
    assert x.grad[0, :, 8, 15].abs().sum() > 0


def test_the_released_layer_adds_its_input_before_the_last_convolution() -> None:
    m = MSAConv(4, out_dim=6, dropout=0.0).double()
    nn.init.zeros_(m.wqkv.weight)
    nn.init.zeros_(m.wqkv.bias)
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(m(x), m.conv(x).relu())
    assert MSAConv(4, kernel=3, stride=2)(torch.randn(1, 4, 8, 8)).shape == (1, 4, 4, 4)


def test_dropout_acts_in_training_alone() -> None:
    m, x = MSAConv(4, dropout=0.5), torch.randn(1, 4, 5, 5)
    assert not torch.equal(m(x), m(x))
    m.eval()
    assert torch.equal(m(x), m(x))


def test_bad_arguments_are_named() -> None:
    for keywords, message in (
        ({"kernel": 4}, "kernel must be odd"),
        ({"kernel": (3, 3, 3)}, "kernel must be a positive integer or two"),
        ({"shift": "up"}, "shift must be one of"),
        ({"inter_pool": "mean"}, "inter_pool must be one of"),
        ({"heads": 3}, "heads must divide"),
        ({"pool": 0}, "pool must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ConvolutionalAttention(8, **keywords)
    with pytest.raises(ValueError, match="x must be"):
        ConvolutionalAttention(8)(torch.randn(1, 8, 5))
