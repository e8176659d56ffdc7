"""Global-query attention: equality with a loop over pixels, whom a far pixel reaches, who shares queries."""

import math

import pytest
import torch
import torch.nn.functional as F

from attnlab.nn.spatial.global_query import GlobalQueryAttention, QueryGenerator


def test_equals_attention_pixel_by_pixel():
    m = GlobalQueryAttention(4, heads=2, window=2, levels=None).double()
    x = torch.randn(2, 4, 6, 4, dtype=torch.float64)
    queries = torch.randn(2, 2, 4, 2, dtype=torch.float64)
    k, v = m.wkv(x).unflatten(-1, (2, 2, 2)).unbind(3)  # (B, H, W, heads, D)
    table, out = m.relative.table.view(3, 3, 2), torch.zeros(2, 4, 6, 2, 2, dtype=torch.float64)
    for b in range(2):
        for i in range(4):
            for j in range(6):
                mine = [(r, c) for r in range(4) for c in range(6) if r // 2 == i // 2 and c // 2 == j // 2]
                for h in range(2):
                    q = queries[b, h, 2 * (i % 2) + j % 2]
                    bias = [table[i % 2 - r % 2 + 1, j % 2 - c % 2 + 1, h] for r, c in mine]
                    scores = [q @ k[b, r, c, h] / math.sqrt(2) + s for (r, c), s in zip(mine, bias, strict=True)]
                    weights = torch.stack(scores).softmax(0)
                    out[b, i, j, h] = sum(w * v[b, r, c, h] for w, (r, c) in zip(weights, mine, strict=True))
    wanted = m.wo(out.flatten(3)).flatten(1, 2)
    torch.testing.assert_close(m(x.flatten(1, 2), grid=(4, 6), queries=queries), wanted)


def test_windows_of_the_same_content_give_the_same_and_images_keep_their_own_queries():
    m = GlobalQueryAttention(8, heads=2, window=4, levels=None)
    tile = torch.randn(1, 4, 4, 8)
    x = tile.repeat(2, 3, 2, 1).flatten(1, 2)  # two images of six equal windows
    y = m(x, grid=(12, 8), queries=torch.randn(2, 2, 16, 4)).view(2, 12, 8, 8)
    torch.testing.assert_close(y, y[:, :4, :4].repeat(1, 3, 2, 1))
    assert not torch.isclose(y[0], y[1]).all()


def test_a_far_pixel_reaches_other_windows_through_the_queries_alone():
    m = GlobalQueryAttention(8, heads=2, window=4, levels=1).double()
    x = torch.randn(1, 64, 8, dtype=torch.float64, requires_grad=True)
    near = m(x, grid=(8, 8))[0, 0].sum()
    assert torch.autograd.grad(near, x)[0][0, 63].any()  # the opposite corner
    fixed = m.generator(x.unflatten(1, (8, 8)).permute(0, 3, 1, 2)).detach()
    near = m(x, grid=(8, 8), queries=fixed)[0, 0].sum()
    reach = torch.autograd.grad(near, x)[0][0].view(8, 8, 8).abs().sum(-1) != 0
    assert reach[:4, :4].all() and not reach[4:].any() and not reach[:, 4:].any()


def test_the_generator_halves_by_overlapping_maxima_after_each_convolution():
    m, x = QueryGenerator(6, heads=3, window=2, levels=2).double(), torch.randn(2, 6, 7, 8, dtype=torch.float64)
    y = x
    for block in m.blocks:
        gate = block.conv1(y)
        gate = F.gelu(gate)
        scale = torch.sigmoid(F.gelu(gate.mean((2, 3)) @ block.se.fc1.weight.T) @ block.se.fc2.weight.T)
        y = y + block.conv2(gate * scale[:, :, None, None])
        padded = F.pad(y, (1, 1, 1, 1), value=-math.inf)
        y = torch.stack([padded[:, :, i:, j:][:, :, :: 2, :: 2][:, :, : -(-y.shape[2] // 2), : -(-y.shape[3] // 2)]
                         for i in range(3) for j in range(3)]).amax(0)  # fmt: skip
    wanted = y.permute(0, 2, 3, 1).reshape(2, 4, 3, 2).transpose(1, 2)
    torch.testing.assert_close(m(x), wanted)


def test_bad_arguments_are_named():
    m = GlobalQueryAttention(8, heads=2, window=4, levels=None)
    with pytest.raises(ValueError, match="queries must be given"):
        m(torch.randn(1, 16, 8), grid=(4, 4))
    with pytest.raises(ValueError, match=r"queries must have shape \(1, 2, 16, 4\), got \(1, 2, 9, 4\)"):
        m(torch.randn(1, 16, 8), grid=(4, 4), queries=torch.randn(1, 2, 9, 4))
    with pytest.raises(ValueError, match="levels must be at least 0, got -1"):
        QueryGenerator(8, heads=2, window=4, levels=-1)
