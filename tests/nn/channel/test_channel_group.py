"""Channel group attention: the equation token by token, its symmetries, both ways to mix, and timm's as a peer."""

import pytest
import torch

from attnlab.hub.official.davit import ChannelAttention as Official
from attnlab.nn.channel.channel_group import ChannelGroupAttention


def oracle(m, x):
    """Channel i of a group gets Σ_j A_ij of the queries' channel j, A from keys and values over all tokens."""
    q, k, v = m.wqkv(x).unflatten(-1, (3, m.heads, -1)).unbind(2)
    out = torch.zeros_like(q)
    for g in range(m.heads):
        for b in range(len(x)):
            products = torch.stack([(k[b, :, g, i, None] * v[b, :, g]).sum(0) for i in range(m.head_dim)])
            weights = torch.softmax(products / m.head_dim**0.5, -1)
            for i in range(m.head_dim):
                out[b, :, g, i] = (q[b, :, g] * weights[i]).sum(-1)
    return m.wo(out.flatten(2))


@pytest.mark.parametrize("tokens", [3, 12], ids=["few", "many"])
def test_equals_the_equation(tokens):
    m = ChannelGroupAttention(8, heads=2).double()
    x = torch.randn(2, tokens, 8, dtype=torch.float64)
    torch.testing.assert_close(m(x), oracle(m, x))


def test_each_channels_weights_sum_to_one():
    m = ChannelGroupAttention(12, heads=3)
    weights = m.weights(torch.randn(2, 9, 12), torch.randn(2, 9, 12))
    assert weights.shape == (2, 3, 4, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 4))


def test_weights_sharpen_as_the_image_grows():
    k, m = torch.randn(1, 16, 8), ChannelGroupAttention(8, heads=1)
    small, large = m.weights(k, k), m.weights(k.repeat(1, 4, 1), k.repeat(1, 4, 1))
    torch.testing.assert_close(large, (small.log() * 4).softmax(-1))


def test_every_output_depends_on_every_place():
    m, x = ChannelGroupAttention(8, heads=2).double(), torch.randn(1, 20, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(m(x)[0, 3].pow(2).sum(), x)[0].abs().sum(-1).all()


def test_equals_timms(timm):
    from timm.models.davit import ChannelAttention

    peer = ChannelAttention(16, num_heads=4, qkv_bias=True)
    ours = Official.build({"dim": 16, "num_heads": 4}, peer.state_dict())
    for tokens in (9, 40):
        x = torch.randn(2, tokens, 16)
        torch.testing.assert_close(ours(x), peer(x), rtol=1e-4, atol=1e-6)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="causal must be False"):
        ChannelGroupAttention(8, heads=2, causal=True)
    with pytest.raises(ValueError, match="heads must divide dim = 8, got 3"):
        ChannelGroupAttention(8, heads=3)
