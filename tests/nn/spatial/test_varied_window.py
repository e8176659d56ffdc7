"""Varied-size windows: the equations point by point, what zero, moved and shrunk windows are, and what they learn."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.nn.spatial.varied_window import VariedWindowAttention


def oracle(m: VariedWindowAttention, x: Tensor) -> Tensor:
    """Window by window and point by point, bilinear reads by hand: (B, C, H, W) in float64."""
    batch, _, height, width = x.shape
    w, heads, d = m.window, m.heads, m.out_dim // m.heads
    full_h, full_w = -(-height // w) * w, -(-width // w) * w
    padded = F.pad(x, (0, full_w - width, 0, full_h - height)).permute(0, 2, 3, 1)
    qkv = F.pad(m.wqkv(x.permute(0, 2, 3, 1)), (0, 0, 0, full_w - width, 0, full_h - height))
    q, k, v = qkv.unflatten(-1, (3, heads, d)).unbind(3)
    out = torch.zeros_like(q)

    def read(maps: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """One bilinear read of (H, W, D) at a place in pixels; zero outside."""
        total = torch.zeros(maps.shape[-1], dtype=maps.dtype)
        for i in (int(row.floor()), int(row.floor()) + 1):
            for j in (int(column.floor()), int(column.floor()) + 1):
                if 0 <= i < full_h and 0 <= j < full_w:
                    total = total + (1 - (row - i).abs()) * (1 - (column - j).abs()) * maps[i, j]
        return total

    for b in range(batch):
        for top in range(0, full_h, w):
            for left in range(0, full_w, w):
                mean = padded[b, top : top + w, left : left + w].mean((0, 1))
                offset, scale = m.regress(F.leaky_relu(mean)).unflatten(0, (2, heads, 2))
                for h in range(heads):
                    dx = offset[h, 0] / max(1, width // w) * (full_w - 1) / 2
                    dy = offset[h, 1] / max(1, height // w) * (full_h - 1) / 2
                    keys, values = [], []
                    for i in range(w):
                        for j in range(w):
                            row = top + (w - 1) / 2 + (i - (w - 1) / 2) * (1 + scale[h, 1]) + dy
                            column = left + (w - 1) / 2 + (j - (w - 1) / 2) * (1 + scale[h, 0]) + dx
                            keys.append(read(k[b, :, :, h], row, column))
                            values.append(read(v[b, :, :, h], row, column))
                    for i in range(w):
                        for j in range(w):
                            bias = torch.stack(
                                [
                                    m.relative.table[(i - r + w - 1) * (2 * w - 1) + j - c + w - 1, h]
                                    for r in range(w)
                                    for c in range(w)
                                ]
                            )
                            scores = torch.stack(keys) @ q[b, top + i, left + j, h] * m.scale + bias
                            out[b, top + i, left + j, h] = scores.softmax(0) @ torch.stack(values)
    return m.wo(out[:, :height, :width].flatten(3)).permute(0, 3, 1, 2)


def made(window: int = 2, heads: int = 2, spread: float = 0.3, **keywords) -> VariedWindowAttention:
    m = VariedWindowAttention(8, heads=heads, window=window, **keywords).double()
    nn.init.normal_(m.regress.weight, std=spread)
    nn.init.normal_(m.regress.bias, std=spread)
    nn.init.normal_(m.relative.table)
    return m


@pytest.mark.parametrize(("size", "keywords"), [((4, 6), {}), ((3, 5), {"out_dim": 4}), ((1, 2), {"window": 3})])
def test_equals_the_equations_point_by_point(size: tuple[int, int], keywords: dict) -> None:
    m, x = made(**keywords), torch.randn(1, 8, *size, dtype=torch.float64)
    torch.testing.assert_close(m(x), oracle(m, x))


def windowed(m: VariedWindowAttention, x: Tensor, moved: int = 0) -> Tensor:
    """Plain window attention, keys and values of the window `moved` windows to the right."""
    w, heads = m.window, m.heads
    q, k, v = m.wqkv(x.permute(0, 2, 3, 1)).unflatten(-1, (3, heads, -1)).unbind(3)

    def cut(t: Tensor) -> Tensor:
        return t.unfold(1, w, w).unfold(2, w, w).permute(0, 1, 2, 3, 5, 6, 4).flatten(4, 5)

    k, v = (cut(t).roll(-moved, 2) for t in (k, v))
    at = torch.arange(w * w)
    row = (at[:, None] // w - at // w + w - 1) * (2 * w - 1) + at[:, None] % w - at % w + w - 1
    out = F.scaled_dot_product_attention(cut(q), k, v, m.relative.table[row].permute(2, 0, 1), scale=m.scale)
    out = out.unflatten(4, (w, w)).permute(0, 1, 4, 2, 5, 3, 6)
    return m.wo(out.flatten(5).flatten(3, 4).flatten(1, 2)).permute(0, 3, 1, 2)


def test_as_built_it_is_plain_window_attention() -> None:
    m, x = made(), torch.randn(2, 8, 4, 6, dtype=torch.float64)
    assert not VariedWindowAttention(8, heads=2).regress.weight.any()
    m.reset_windows()
    torch.testing.assert_close(m(x), windowed(m, x))


def test_an_offset_of_a_window_reads_the_next_window() -> None:
    m, x = made(), torch.randn(2, 8, 4, 6, dtype=torch.float64)
    m.reset_windows()
    # Two pixels of six are 2·2/5 of the extent, and the offset is divided by the three windows of a row.
    m.regress.bias.data[torch.tensor([0, 2])] = 2 * 2 / 5 * 3
    torch.testing.assert_close(m(x)[..., :4], windowed(m, x, moved=1)[..., :4])


def test_what_lies_outside_of_the_map_is_zero_and_stays_in_the_softmax() -> None:
    m, x = made(), torch.randn(1, 8, 4, 6, dtype=torch.float64)
    m.reset_windows()
    m.regress.bias.data[:4] = 100.0  # far away
    nn.init.zeros_(m.wo.bias)
    assert not m(x).any()


def test_a_scale_of_minus_one_makes_all_keys_the_centre() -> None:
    m, x = made(window=3), torch.randn(1, 8, 6, 6, dtype=torch.float64)
    m.reset_windows()
    m.regress.bias.data[4:] = -1.0
    value = m.wqkv(x.permute(0, 2, 3, 1))[..., 16:][:, 1::3, 1::3]
    wanted = m.wo(value).permute(0, 3, 1, 2).repeat_interleave(3, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(m(x), wanted)


def test_windows_learn_the_size_of_what_they_stand_on_and_keep_it_at_another_resolution() -> None:
    """Each window must report what lies at the corner of its object, near or three times as far."""
    torch.manual_seed(0)

    def canvas(windows: int) -> tuple[Tensor, Tensor, Tensor]:
        side = 4 * windows
        field = F.interpolate(torch.randn(8, 1, windows + 1, windows + 1), size=(side, side), mode="bicubic")
        large = torch.randint(2, (8, 1, windows, windows)).float()
        corner = torch.arange(windows) * 4 + 1.5 - 1.5  # and 1.5 − 4.5 for large objects
        near, far = corner.long(), (corner - 3).clamp_min(0).long()
        target = torch.where(large.bool(), field[:, :, far][..., far], field[:, :, near][..., near])
        flags = large.repeat_interleave(4, 2).repeat_interleave(4, 3)
        return torch.cat((field, flags, torch.ones_like(field), torch.zeros_like(field)), 1), target, large

    def error(m: VariedWindowAttention, windows: int) -> Tensor:
        x, target, _ = canvas(windows)
        # The last query of a window, for which the first key has a displacement of its own.
        return (m(x)[:, :1, 3::4, 3::4] - target)[:, :, 1:, 1:].square().mean()

    def trained(varied: bool) -> VariedWindowAttention:
        m = VariedWindowAttention(4, heads=1, window=4)
        m.regress.requires_grad_(varied)
        with torch.no_grad():
            m.relative.table[-1] = 8.0
        optimizer = torch.optim.Adam(m.parameters(), 2e-2)
        for _ in range(150):
            optimizer.zero_grad()
            error(m, 3).backward()
            optimizer.step()
        return m

    fixed, varied = trained(False), trained(True)
    with torch.no_grad():
        assert error(varied, 3) < 0.5 * error(fixed, 3)
        # Offsets are learned in parts of the map, scales in windows: at 1.5 times the resolution sizes still hold.
        x, _, large = canvas(6)
        scales = varied.windows(x.permute(0, 2, 3, 1))[1].mean((1, 2))[:, None]
        assert scales[large > 0].mean() > scales[large == 0].mean() + 0.3


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="x must be"):
        VariedWindowAttention(8, heads=2)(torch.randn(1, 4, 6, 6))
    with pytest.raises(ValueError, match="heads must divide"):
        VariedWindowAttention(8, heads=3)
    with pytest.raises(ValueError, match="window must be"):
        VariedWindowAttention(8, heads=2, window=0)
