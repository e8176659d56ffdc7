"""Halo attention: a transcription in loops, its limits, translation by whole blocks, and why the halo is there."""

import pytest
import torch
from torch import Tensor, nn

from attnlab.nn.spatial.halo import HaloAttention


def oracle(m: HaloAttention, x: Tensor) -> Tensor:
    """Query by query in float64: keys outside the map are zero vectors, or absent if `masked`."""
    batch, _, height, width = x.shape
    maps = x.permute(0, 2, 3, 1)
    b, halo, d, dv = m.block, m.halo, m.head_dim, m.value_dim
    window = b + 2 * halo
    q = m.wq(maps).unflatten(-1, (m.heads, d))
    kv = m.wkv(maps).unflatten(-1, (m.heads, d + dv))
    out = x.new_zeros(batch, height // m.step, width // m.step, m.heads, dv)
    for y in range(0, height, m.step):
        for c in range(0, width, m.step):
            top, left = y // b * b - halo, c // b * b - halo
            at = (y % b // m.step, c % b // m.step)
            logits, values = [], []
            for i in range(window):
                for j in range(window):
                    inside = 0 <= top + i < height and 0 <= left + j < width
                    if m.masked and not inside:
                        continue
                    key = kv[:, top + i, left + j] if inside else torch.zeros_like(kv[:, 0, 0])
                    relative = m.rows[i - at[0] + window - 1] + m.columns[j - at[1] + window - 1]
                    relative = relative * (d**-0.5 if m.scale_positions else 1.0)
                    logits.append((q[:, y, c] * (key[..., :d] * d**-0.5 + relative)).sum(-1))
                    values.append(key[..., d:])
            weights = torch.stack(logits, -1).softmax(-1)
            out[:, y // m.step, c // m.step] = (weights[..., None] * torch.stack(values, -2)).sum(-2)
    out = out.flatten(3).permute(0, 3, 1, 2)
    return nn.functional.avg_pool2d(out, 2) if m.pooled else out


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"halo": 0},
        {"masked": True},
        {"stride": 2, "scale_positions": True},
        {"stride": 2, "average": True},
        {"out_dim": 24, "head_dim": 2, "bias": True},
        {"out_dim": 4, "head_dim": 3, "masked": True},
    ],
    ids=lambda k: "-".join(k) or "plain",
)
def test_equals_the_loops(keywords: dict) -> None:
    m = HaloAttention(8, **{"heads": 2, "block": 2, "halo": 1, **keywords}).double()
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(m(x), oracle(m, x))


def test_odd_blocks_with_stride_two_are_averaged() -> None:
    m = HaloAttention(8, heads=2, block=3, halo=1, stride=2).double()
    x = torch.randn(1, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(m(x), oracle(m, x))
    assert m.pooled and m.step == 1


def test_one_block_without_halo_is_global_attention_with_relative_logits() -> None:
    m = HaloAttention(8, heads=2, block=6, halo=0).double()
    x = torch.randn(1, 8, 6, 6, dtype=torch.float64)
    q, kv = (layer(x.permute(0, 2, 3, 1)).flatten(1, 2).unflatten(-1, (2, -1)) for layer in (m.wq, m.wkv))
    place = torch.arange(36)
    rows = m.rows[(place // 6 - place[:, None] // 6) + 5]
    columns = m.columns[(place % 6 - place[:, None] % 6) + 5]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, kv[..., :4]) / 2 + torch.einsum("bqhd,qkd->bhqk", q, rows + columns)
    wanted = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), kv[..., 4:]).flatten(2)
    torch.testing.assert_close(m(x).flatten(2).transpose(1, 2), wanted)


def test_without_positions_an_interior_block_is_dense_attention_on_its_window() -> None:
    m = HaloAttention(8, heads=2, block=2, halo=1).double()
    nn.init.zeros_(m.rows)
    nn.init.zeros_(m.columns)
    x = torch.randn(1, 8, 6, 6, dtype=torch.float64)
    maps = x.permute(0, 2, 3, 1)
    q = m.wq(maps[:, 2:4, 2:4]).flatten(1, 2).unflatten(-1, (2, 4)).transpose(1, 2)
    k, v = m.wkv(maps[:, 1:5, 1:5]).flatten(1, 2).unflatten(-1, (2, 8)).transpose(1, 2).split(4, -1)
    wanted = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(m(x)[:, :, 2:4, 2:4].flatten(2).transpose(1, 2), wanted)


def test_moving_the_map_by_a_block_moves_the_output_and_moving_it_by_less_does_not() -> None:
    m = HaloAttention(8, heads=2, block=4, halo=1).double()
    x = torch.randn(1, 8, 16, 16, dtype=torch.float64)

    def moved(by: int) -> tuple[Tensor, Tensor]:
        inside = slice(4 + by, 12)
        return m(x.roll((by, by), (2, 3)))[:, :, inside, inside], m(x).roll((by, by), (2, 3))[:, :, inside, inside]

    torch.testing.assert_close(*moved(4))
    assert (moved(2)[0] - moved(2)[1]).abs().max() > 1e-3


def test_only_a_halo_sees_across_the_border_of_a_block() -> None:
    """A task of displaced cues: each place must report what lies two places to its left."""

    def accuracy(halo: int) -> float:
        torch.manual_seed(0)
        m = HaloAttention(16, heads=2, block=4, halo=halo)
        embed, head = nn.Linear(4, 16), nn.Linear(16, 4)
        optimizer = torch.optim.Adam([*m.parameters(), *embed.parameters(), *head.parameters()], 2e-2)
        for _ in range(100):
            cues = torch.randint(4, (8, 8, 8))
            seen = embed(nn.functional.one_hot(cues, 4).float()).permute(0, 3, 1, 2)
            logits = head(m(seen).permute(0, 2, 3, 1))[:, :, 4:]
            loss = nn.functional.cross_entropy(logits.flatten(0, 2), cues[:, :, 2:6].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (logits.argmax(-1) == cues[:, :, 2:6]).float().mean().item()

    # Two of four columns of a block find their cue in the block before: without a halo those are guessed, 1 in 4.
    assert accuracy(0) < 0.75
    assert accuracy(2) > 0.9


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="multiples of block=4, got \\(4, 6\\)"):
        HaloAttention(8, heads=2, block=4)(torch.randn(1, 8, 4, 6))
    with pytest.raises(ValueError, match="heads"):
        HaloAttention(8, heads=3)
    with pytest.raises(ValueError, match="stride must be 1 or 2"):
        HaloAttention(8, stride=3)
    with pytest.raises(ValueError, match="block must be at least 1"):
        HaloAttention(8, block=0)
