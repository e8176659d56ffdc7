"""DaViT: the authors' cost, timm's network as a peer, any image size, the order of norms and filling."""

import pytest
import torch
from torch import nn

import attnlab
from attnlab.cost import count_flops
from attnlab.hub.official.davit import TimmDaViT
from attnlab.models.vision.davit import DaViT, DualBlock, NormPatches, PlaceConv
from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.multi_axis import BlockAttention


def test_costs_what_the_authors_say():
    with torch.device("meta"), torch.no_grad():
        flops = count_flops(attnlab.build("davit_tiny").eval(), torch.randn(1, 3, 224, 224))
    assert flops / 2 == pytest.approx(4_540_244_736, rel=0.02)


TINY = {"embed_dims": (8, 16), "depths": (1, 2), "num_heads": (2, 4), "window_size": 3, "num_classes": 5}


@pytest.mark.parametrize("options", [{}, {"down_kernel_size": 3}], ids=["plain", "overlap"])
def test_equals_timms_network(timm, options):
    from timm.models.davit import DaVit as Peer

    peer = Peer(**TINY, **options).eval()
    for p in peer.parameters():
        nn.init.normal_(p, mean=0.0 if p.ndim > 1 else 0.3, std=0.3)
    net = TimmDaViT.build({**TINY, **options}, peer.state_dict())
    x = torch.randn(2, 3, 32, 44, requires_grad=True)
    ours, theirs = net(x), peer(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(y.pow(2).sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5 * theirs.abs().max().item())


def test_florences_tower_is_refused_by_name():
    with pytest.raises(ValueError, match="channel_attn_v2 must be False"):
        TimmDaViT.build({"channel_attn_v2": True}, {})


@pytest.mark.parametrize("size", [(32, 32), (37, 51), (8, 90)])
@pytest.mark.parametrize("overlap", [False, True])
def test_takes_any_image_size(size, overlap):
    net = DaViT(dim=8, depths=(1, 1), heads=(2, 2), window=3, overlap=overlap, num_classes=5)
    assert net(torch.randn(1, 3, *size)).shape == (1, 5)


def test_filling_comes_after_the_norm():
    down, x = NormPatches(4, 6, 2), torch.randn(1, 4, 3, 3)
    by_hand = torch.zeros(1, 4, 4, 4)
    by_hand[..., :3, :3] = down.norm(x)
    torch.testing.assert_close(down(x), down.conv(by_hand))


def test_a_place_convolution_adds_to_what_it_sees():
    conv, x = PlaceConv(4), torch.randn(2, 4, 5, 6)
    plain = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1, groups=4)
    torch.testing.assert_close(conv(x), x + plain)


def test_a_window_as_large_as_the_map_is_full_attention():
    mixer = BlockAttention(8, heads=2, window=5, biased=False, see_filling=True)
    full = MultiHead(8, heads=2, bias=True)
    full.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 25, 8)
    torch.testing.assert_close(mixer(x, grid=(5, 5)), full(x))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="mixers must be of 'spatial' and 'channel'"):
        DaViT(mixers=("temporal",))
    with pytest.raises(ValueError, match="dim, depths and heads need one entry per stage, got 4, 4 and 2"):
        DaViT(heads=(2, 4))


def test_a_block_without_mlp_has_no_second_half():
    block = DualBlock(8, MultiHead(8, heads=2, bias=True), mlp_ratio=0)
    assert not any(name.startswith(("mlp", "norm2")) for name, _ in block.named_parameters())
