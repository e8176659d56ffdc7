"""Strip attention: the equations, rank one, its limits, padding, counted cost; and the local interaction."""

import pytest
import torch
from torch import nn

from attnlab.cost import count_flops
from attnlab.nn.spatial.strip import LocalInteraction, StripAttention

D = torch.float64


def by_hand(module: StripAttention, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Place by place and head by head, from the equations, with a depth-wise reduction."""
    (height, width), r, dim = grid, module.ratio, module.dim
    maps = x.unflatten(1, grid)
    rows, columns = -(-height // r), -(-width // r)
    z = torch.zeros(len(x), rows * columns, dim, dtype=D)
    for i in range(rows):
        for j in range(columns):
            part = maps[:, i * r : (i + 1) * r, j * r : (j + 1) * r]  # what is missing at the edge counts as zeros
            kernel = module.reduce.weight[:, 0, : part.shape[1], : part.shape[2]]
            z[:, i * columns + j] = torch.einsum("byxc,cyx->bc", part, kernel) + module.reduce.bias
    z = nn.functional.layer_norm(z, (dim,), module.norm.weight, module.norm.bias, 1e-6)
    q, kv = module.wq(x), module.wkv(z)
    out, width_of_v = torch.zeros_like(x), dim // module.heads
    for h in range(module.heads):
        weights = torch.softmax(q[:, :, h, None] * kv[:, None, :, h], -1)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        own = slice(module.heads + h * width_of_v, module.heads + (h + 1) * width_of_v)
        out[:, :, h * width_of_v : (h + 1) * width_of_v] = weights @ kv[:, :, own]
    return module.wo(out)


@pytest.mark.parametrize(("grid", "ratio"), [((4, 6), 2), ((5, 7), 3)])
def test_equals_the_equations(grid, ratio):
    module, x = StripAttention(8, heads=2, ratio=ratio).to(D), torch.randn(2, grid[0] * grid[1], 8, dtype=D)
    torch.testing.assert_close(module(x, grid=grid), by_hand(module, x, grid))


def test_scores_have_rank_one_and_every_query_orders_keys_alike():
    module, x = StripAttention(8, heads=2, ratio=2).to(D), torch.randn(1, 24, 8, dtype=D)
    q, k, v = module.qkv(x, (4, 6))
    scores = q @ k.mT
    assert torch.linalg.matrix_rank(scores).tolist() == [[1, 1]] and v.shape == (1, 2, 6, 4)
    orders = {tuple(row) for row in scores[0, 0].argsort(-1).tolist()}
    first = next(iter(orders))
    assert orders <= {first, first[::-1]}


def test_with_wide_keys_of_every_place_it_is_torchs_attention():
    module, x = StripAttention(8, heads=2, qk_dim=4).to(D), torch.randn(2, 15, 8, dtype=D)
    peer = nn.MultiheadAttention(8, 2, batch_first=True).to(D)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat((module.wq.weight, module.wkv.weight)))
        peer.in_proj_bias.copy_(torch.cat((module.wq.bias, module.wkv.bias)))
        peer.out_proj.weight.copy_(module.wo.weight), peer.out_proj.bias.copy_(module.wo.bias)
    torch.testing.assert_close(module(x, grid=(3, 5)), peer(x, x, x, need_weights=False)[0])


def test_with_wide_keys_of_a_coarse_map_it_is_timms_attention(timm):
    from timm.models.pvt_v2 import Attention

    peer, module = (
        Attention(8, num_heads=2, sr_ratio=2),
        StripAttention(8, heads=2, qk_dim=4, ratio=2, reduction="conv"),
    )
    names = {"q": "wq", "kv": "wkv", "proj": "wo", "sr": "reduce"}
    state = {names.get(n.split(".")[0], "norm") + "." + n.split(".")[1]: t for n, t in peer.state_dict().items()}
    module.load_state_dict(state)
    peer.norm.eps = module.norm.eps
    x = torch.randn(2, 24, 8)
    torch.testing.assert_close(module(x, grid=(4, 6)), peer(x, [4, 6]), rtol=1e-4, atol=1e-6)


def test_many_scores_are_not_written_out(monkeypatch):
    module, x = StripAttention(8, heads=2, ratio=2).to(D), torch.randn(1, 24, 8, dtype=D)
    written = module(x, grid=(4, 6))
    monkeypatch.setattr("attnlab.nn.spatial.thin._WRITTEN_OUT", 10)
    torch.testing.assert_close(module(x, grid=(4, 6)), written)


def test_shared_scores_are_one_map():
    module, x = StripAttention(8, heads=2, ratio=2, shared=True).to(D), torch.randn(1, 24, 8, dtype=D)
    weights = module.weights(x, grid=(4, 6))
    v = module.wkv(module.coarse(x, (4, 6)))[..., 1:]
    assert weights.shape == (1, 1, 24, 6)
    torch.testing.assert_close(module(x, grid=(4, 6)), module.wo(weights[:, 0] @ v))


@pytest.mark.parametrize("reduction", ["dwconv", "conv", "avgpool"])
def test_maps_are_filled_up_to_whole_parts(reduction):
    module, x = StripAttention(8, heads=2, ratio=4, reduction=reduction).to(D), torch.randn(1, 30, 8, dtype=D)
    filled = nn.functional.pad(x.unflatten(1, (5, 6)), (0, 0, 0, 2, 0, 3)).flatten(1, 2)
    torch.testing.assert_close(module.coarse(x, (5, 6)), module.coarse(filled, (8, 8)))
    assert module.coarse(x, (5, 6)).shape == (1, 4, 8)


def test_costs_what_the_formula_says():
    dim, heads, ratio, side = 32, 4, 2, 16
    n, small = side * side, side * side // ratio**2
    module = StripAttention(dim, heads=heads, ratio=ratio)
    with torch.no_grad():
        flops = count_flops(module, torch.randn(1, n, dim), grid=(side, side))
    macs = n * dim * heads + n * dim**2 + small * (dim * heads + dim**2 + ratio**2 * dim) + n * small * (heads + dim)
    assert flops == 2 * macs


def test_the_local_interaction_is_what_it_says():
    module, x = LocalInteraction(8).to(D), torch.randn(2, 8, 4, 5, dtype=D)
    z = module.w1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    z = nn.functional.gelu(nn.functional.conv2d(z, module.conv.weight, module.conv.bias, padding=1, groups=8))
    z = module.w2(z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    squeezed = module.gate.fc1(z.mean((2, 3))).relu()
    assert squeezed.shape == (2, 2)
    torch.testing.assert_close(module(x), z * module.gate.fc2(squeezed).sigmoid()[:, :, None, None])
    assert sum(p.numel() for p in LocalInteraction(8, gate=False).parameters()) == 2 * 72 + 80


def test_bad_arguments_are_named():
    for message, options in (
        ("reduction must be one of dwconv, conv, avgpool, got 'max'", {"reduction": "max"}),
        ("ratio must be at least 1, got 0", {"ratio": 0}),
        ("qk_dim must be at least 1, got 0", {"qk_dim": 0}),
        ("causal must be False", {"causal": True}),
        ("heads must divide dim = 8, got 3", {"heads": 3}),
    ):
        with pytest.raises(ValueError, match=message):
            StripAttention(8, **{"heads": 2, **options})
