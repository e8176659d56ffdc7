"""Cosine and aggregated attention: equal to their definitions, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.nn.spatial.aggregated import AggregatedAttention, CosineAttention, relative_places

DIM, HEADS = 8, 2


def make(kind: type = AggregatedAttention, **keywords) -> CosineAttention:
    torch.manual_seed(0)
    m = kind(DIM, heads=HEADS, **keywords).double().eval()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return m


def place_bias(m: CosineAttention, h: int, offset: tuple[float, float], grid: tuple[int, int]) -> Tensor:
    scaled = [o / max(g - 1, 1) * 8 for o, g in zip(offset, grid, strict=True)]
    logs = torch.tensor([math.copysign(math.log2(abs(o) + 1) / 3, o) for o in scaled], dtype=torch.float64)
    return (m.cpb_fc2.weight @ torch.relu(m.cpb_fc1.weight @ logs + m.cpb_fc1.bias) + m.cpb_fc2.bias)[h]


def by_hand(m: CosineAttention, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """One query at a time: its window if it has one, and the cells of the pooled map."""
    (height, width), d, out = grid, m.head_dim, torch.zeros_like(x)
    local = isinstance(m, AggregatedAttention)
    cells = m.pooled(grid)
    for b in range(len(x)):
        far = x[b]
        if local:
            image = F.gelu(m.reduce(x[b])).T.view(1, DIM, height, width)
            far = m.norm(F.adaptive_avg_pool2d(image, cells)[0].flatten(1).T)
        axes = [
            F.adaptive_avg_pool1d(torch.arange(g, dtype=torch.float64)[None], c)[0].tolist()
            for g, c in zip(grid, cells, strict=True)
        ]
        centres = [(r, c) for r in axes[0] for c in axes[1]]
        gates = torch.ones(len(x[b]), HEADS) if m.router is None else m.router(x[b])
        heads = torch.zeros(x.shape[1], HEADS, d, dtype=torch.float64)
        for h in range(HEADS):
            rows = [slice(p * DIM + h * d, p * DIM + (h + 1) * d) for p in range(3)]
            q, k, v = (x[b] @ m.wqkv.weight[r].T + m.wqkv.bias[r] for r in rows)
            k_far, v_far = (far @ m.wqkv.weight[r].T + m.wqkv.bias[r] for r in rows[1:])
            for i in range(x.shape[1]):
                at = divmod(i, width)
                unit = q[i] / q[i].norm()
                near = []
                if local:
                    reach = m.window // 2
                    for place in range(m.window**2):
                        r, c = at[0] + place // m.window - reach, at[1] + place % m.window - reach
                        if 0 <= r < height and 0 <= c < width:
                            near.append((place, r * width + c))
                keys = len(near) + len(far)
                sharp = (unit + m.query_embedding[h, 0]) * F.softplus(m.temperature[h, 0, 0]) * math.log(keys)
                scores = [sharp @ k[j] / k[j].norm() + m.window_bias[h, p] for p, j in near]
                for j in range(len(far)):
                    offset = at[0] - centres[j][0], at[1] - centres[j][1]
                    scores.append(sharp @ k_far[j] / k_far[j].norm() + place_bias(m, h, offset, grid))
                w = torch.stack(scores).softmax(0)
                mixed = w[len(near) :] @ v_far
                for n, (p, j) in enumerate(near):
                    mixed = mixed + (w[n] + unit @ m.window_tokens[h, :, p] + m.window_shift[h, 0, p]) * v[j]
                heads[i, h] = mixed * gates[i, h]
        out[b] = heads.flatten(1) @ m.wo.weight.T + m.wo.bias
    return out


@pytest.mark.parametrize(
    ("kind", "keywords"),
    [
        (AggregatedAttention, dict(ratio=2)),
        (AggregatedAttention, dict(pool=1, window=5, shared=1, routed=1)),
        (CosineAttention, dict()),
        (CosineAttention, dict(shared=0, routed=1)),
    ],
)
@torch.no_grad()
def test_equals_the_definition(kind: type, keywords: dict) -> None:
    m, x = make(kind, **keywords), torch.randn(2, 12, DIM, dtype=torch.float64)
    # The table of places is made in float32.
    torch.testing.assert_close(m(x, grid=(4, 3)), by_hand(m, x, (4, 3)), rtol=1e-5, atol=1e-6)


def test_places_hold_each_offset_once_and_read_eight_across_the_trained_grid() -> None:
    index, table = relative_places((4, 4), (4, 4))
    assert len(table) == 7 * 7 and index.shape == (256,)
    assert table.abs().max().item() == pytest.approx(math.log2(9) / 3)
    wide = relative_places((8, 8), (8, 8), (4, 4))[1]
    assert wide.max() > table.max()


def test_kept_places_follow_the_grid() -> None:
    m, x = make(CosineAttention), torch.randn(1, 12, DIM, dtype=torch.float64)
    first = m(x, grid=(3, 4))
    assert not torch.allclose(m(x, grid=(4, 3)), first)
    assert torch.equal(m(x, grid=(3, 4)), first)


def test_zero_scores_of_the_router_leave_the_attention_as_it_is_without() -> None:
    m, plain, x = make(shared=1, routed=1), make(), torch.randn(1, 12, DIM, dtype=torch.float64)
    plain.load_state_dict({n: p for n, p in m.state_dict().items() if not n.startswith("router")})
    nn.init.zeros_(m.router.weight)
    torch.testing.assert_close(m(x, grid=(3, 4)), plain(x, grid=(3, 4)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(window=2), "window must be odd"),
        (lambda: make(ratio=0), "ratio and pool must be at least 1"),
        (lambda: make(causal=True), "has no causal form"),
        (lambda: make(shared=1), "shared and routed must be given together"),
        (lambda: make()(torch.randn(1, 6, DIM).double(), torch.randn(1, 6, DIM).double(), grid=(2, 3)), "no context"),
    ],
)
def test_errors_name_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("grid", "cells"), [((4, 6), (2, 3)), ((7, 5), (3, 2)), ((5, 5), (5, 5))])
def test_places_are_those_of_pooled_coordinates(grid: tuple[int, int], cells: tuple[int, int]) -> None:
    index, table = relative_places(grid, cells)
    at = [torch.arange(g, dtype=torch.float32) for g in grid]
    centres = [F.adaptive_avg_pool1d(a[None], c)[0] for a, c in zip(at, cells, strict=True)]
    query, key = torch.cartesian_prod(*at), torch.cartesian_prod(*centres)
    offset = (query[:, None] - key) / (torch.tensor(grid) - 1) * 8
    wanted = offset.sign() * (offset.abs() + 1).log2() / 3
    torch.testing.assert_close(table[index].view_as(wanted), wanted)
    assert len(torch.unique(table, dim=0)) == len(table) == len(torch.unique(index))


@torch.no_grad()
def test_only_the_direction_of_a_query_counts_and_outside_a_grid_nothing_weighs() -> None:
    m, x = make(ratio=2), torch.randn(1, 12, DIM, dtype=torch.float64)
    first = m(x, grid=(3, 4))
    for p in (m.wqkv.weight, m.wqkv.bias):
        p[:DIM] *= 3
    torch.testing.assert_close(m(x, grid=(3, 4)), first)
    bias = m.bias((3, 4), x)[:, 0, :9]  # of the corner's window
    assert bias.isinf().sum(-1).tolist() == [5, 5]


@torch.no_grad()
def test_what_is_kept_without_gradients_follows_the_parameters_however_they_change() -> None:
    m, x = make(), torch.randn(1, 12, DIM, dtype=torch.float64)
    first = m(x, grid=(3, 4))
    for p in (m.cpb_fc2.weight, m.window_bias):
        p.data.add_(torch.randn_like(p))
        changed = m(x, grid=(3, 4))
        assert not torch.allclose(changed, first)
        with torch.enable_grad():
            torch.testing.assert_close(m(x, grid=(3, 4)), changed)
        first = changed


@torch.no_grad()
def test_a_key_that_fits_keeps_its_weight_among_ever_more_others_as_scores_grow_with_their_log() -> None:
    m = CosineAttention(64, heads=1)
    keys = F.normalize(torch.randn(1, 1, 4096, 64), dim=-1)

    def weight(n: int, scale: float) -> float:
        """That of the key which equals the query, among n."""
        return (m.sharp(keys[:, :, :1], scale) @ keys[:, :, :n].mT).softmax(-1)[..., 0].item()

    m.temperature.fill_(0.5)
    few = weight(64, math.log(64))
    assert weight(4096, math.log(4096)) > 0.7 * few
    assert weight(4096, math.log(64)) < 0.05 * few  # at the scale of few keys it drowns
