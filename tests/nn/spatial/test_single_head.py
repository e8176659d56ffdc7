"""Single-head attention: the equations, what passes by, its limit, symmetry, and what it costs."""

import pytest
import torch
from torch import nn

from attnlab.cost import count_flops
from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.single_head import SingleHeadAttention


def trained(dim: int = 12, width: int = 5, key_dim: int = 4) -> SingleHeadAttention:
    module = SingleHeadAttention(dim, width=width, key_dim=key_dim).double().eval()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if "running_var" in name else nn.init.normal_(tensor, std=0.5)
    return module


def by_hand(module: SingleHeadAttention, x: torch.Tensor) -> torch.Tensor:
    """Pixel by pixel, from the paper's equations."""

    def conv(layer, z):
        y = torch.einsum("oc,bchw->bohw", layer.conv.weight[:, :, 0, 0], z)
        n = layer.norm
        mean, var, weight, bias = (t[:, None, None] for t in (n.running_mean, n.running_var, n.weight, n.bias))
        return (y - mean) / (var + n.eps).sqrt() * weight + bias

    first, rest = x[:, : module.width], x[:, module.width :]
    mean, var = first.mean((1, 2, 3), keepdim=True), first.var((1, 2, 3), keepdim=True, correction=0)
    normed = (first - mean) / (var + 1e-5).sqrt()
    normed = normed * module.norm.weight[:, None, None] + module.norm.bias[:, None, None]
    qkv = conv(module.wqkv, normed).flatten(2)
    q, k, v = qkv.split((module.key_dim, module.key_dim, module.width), 1)
    out = torch.zeros_like(v)
    for i in range(q.shape[2]):
        weights = ((q[:, :, i, None] * k).sum(1) / module.key_dim**0.5).softmax(-1)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[:, 0]))
        out[:, :, i] = (weights[:, None] * v).sum(-1)
    return conv(module.wo, torch.cat((out.view_as(first), rest), 1).clamp(min=0))


def test_equals_the_equations():
    module, x = trained(), torch.randn(2, 12, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(module(x), by_hand(module, x))


def test_the_gradient_of_one_image_is_that_of_the_same_in_a_batch():
    module, x = trained(), torch.randn(2, 12, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 12, 3, 4, dtype=torch.float64)
    together = torch.autograd.grad((module(x) * weight).sum(), x)[0]
    alone = torch.autograd.grad((module(x[:1]) * weight[:1]).sum(), x)[0]
    torch.testing.assert_close(alone[:1], together[:1])


def test_pixels_may_change_places():
    module, x = trained(), torch.randn(2, 12, 3, 4, dtype=torch.float64)
    order = torch.randperm(12)
    shuffled = module(x.flatten(2)[..., order].view_as(x))
    torch.testing.assert_close(shuffled.flatten(2), module(x).flatten(2)[..., order])


def test_the_channels_that_pass_by_stay_in_their_pixel():
    module, x = trained(), torch.randn(1, 12, 3, 4, dtype=torch.float64)
    changed = x.clone()
    changed[:, 5:, 1, 2] += 1
    moved = (module(changed) - module(x)).abs().amax(1)[0] > 1e-12
    assert moved[1, 2] and moved.sum() == 1
    changed = x.clone()
    changed[:, :5, 1, 2] += torch.randn(5, dtype=x.dtype)
    assert bool(((module(changed) - module(x)).abs().amax(1) > 1e-12).all())


def test_with_all_channels_it_is_attention_of_one_head():
    module, x = trained(dim=6, width=6, key_dim=6), torch.randn(2, 6, 3, 4, dtype=torch.float64)
    for norm in (module.wqkv.norm, module.wo.norm):  # batch norms that do nothing
        norm.running_mean.zero_(), norm.running_var.fill_(1 - norm.eps)
        nn.init.ones_(norm.weight), nn.init.zeros_(norm.bias)
    full = MultiHead(6, heads=1).double()
    full.wqkv.weight = nn.Parameter(module.wqkv.conv.weight[:, :, 0, 0])
    full.wo = nn.Sequential(nn.ReLU(), full.wo)
    full.wo[1].weight = nn.Parameter(module.wo.conv.weight[:, :, 0, 0])
    tokens = module.norm(x).flatten(2).mT
    torch.testing.assert_close(module(x), full(tokens).mT.reshape(x.shape))


def test_costs_less_than_half_of_attention_with_many_heads():
    dim, side = 224, 14
    single, many = SingleHeadAttention(dim, width=48), MultiHead(dim, heads=7)
    with torch.no_grad():
        ours = count_flops(single.eval(), torch.randn(1, dim, side, side))
        theirs = count_flops(many, torch.randn(1, side * side, dim))
    assert ours < theirs / 2


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"width must be in \[1, dim = 8\], got 9"):
        SingleHeadAttention(8, width=9)
    with pytest.raises(ValueError, match="key_dim must be at least 1, got 0"):
        SingleHeadAttention(8, key_dim=0)
    with pytest.raises(ValueError, match=r"x must be \(B, 8, H, W\)"):
        SingleHeadAttention(8)(torch.randn(1, 9, 2, 2))
