"""ConViT: timm's network with the same weights, the late class token, its start, any image size."""

import pytest
import torch
from torch import nn

import attnlab
from attnlab.cost import count_flops
from attnlab.hub.official.convit import VisionTransformer
from attnlab.models.vision.convit import ConViT
from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.gated_positional import GatedPositionalAttention

TINY = {"dim": 16, "depth": 3, "heads": 4, "local": 2, "image": 32, "patch": 8, "num_classes": 5}


@pytest.mark.parametrize("bias", [False, True])
def test_equals_timms_network(timm, bias: bool) -> None:
    from timm.models.convit import ConVit

    arguments = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 4, "num_heads": 4, "depth": 3,
                 "local_up_to_layer": 2, "qkv_bias": bias}  # fmt: skip
    peer = ConVit(**arguments).eval()
    for p in peer.parameters():
        nn.init.normal_(p, std=0.2)
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    theirs = peer(x)
    ours = VisionTransformer.build({**arguments, "norm_layer": "LayerNorm eps=1e-6"}, peer.state_dict()).eval()
    torch.testing.assert_close(ours(x), theirs, rtol=1e-4, atol=1e-5)
    found, wanted = (torch.autograd.grad(net(x).pow(2).sum(), x)[0] for net in (ours, peer))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_heads_look_as_far_as_timm_says(timm) -> None:
    from timm.models.convit import GPSA

    from attnlab.hub.official.convit import GPSA as Adapter

    peer = GPSA(16, num_heads=4)
    ours, x = Adapter.build({"dim": 16, "num_heads": 4}, peer.state_dict()), torch.randn(2, 16, 16)
    peer(x)
    torch.testing.assert_close(ours.non_locality(x, grid=(4, 4)), peer.get_attention_map(x))


def test_the_class_token_joins_after_the_local_blocks() -> None:
    net = ConViT(**TINY).eval()
    kinds = [type(block.mixer) for block in net.encoder.blocks]
    assert kinds == [GatedPositionalAttention, GatedPositionalAttention, MultiHead]
    after, grid = net.run(torch.randn(1, 3, 32, 40))
    assert [t.shape[1] for t in after] == [20, 20, 21] and grid == (4, 5)


def test_begins_local_in_every_gated_block() -> None:
    net = ConViT(**TINY, locality=0.7)
    for block in net.encoder.blocks[:2]:
        assert torch.equal(block.mixer.wqkv.weight[32:], torch.eye(16))
        assert torch.equal(block.mixer.gate, torch.ones(4))
        torch.testing.assert_close(block.mixer.position_logits.weight[0], torch.tensor([-0.7, -0.7, -0.7]))


def test_costs_what_the_paper_says() -> None:
    with torch.device("meta"), torch.no_grad():
        for name, billions in (("convit_tiny", 1.0), ("convit_small", 5.4), ("convit_base", 17.0)):
            flops = count_flops(attnlab.build(name), torch.randn(1, 3, 224, 224)) / 2e9
            # The positional half costs the paper's code as much as the content half; here next to nothing.
            assert flops == pytest.approx(billions, abs=0.6)


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (64, 40)])
def test_takes_images_of_whole_patches(size: tuple[int, int]) -> None:
    net, x = ConViT(**TINY).eval(), torch.randn(2, 3, *size)
    assert net(x).shape == (2, 5)
    maps = net.forward_features(x, layers=(0, -1))
    assert [m.shape for m in maps] == [(2, 16, size[0] // 8, size[1] // 8)] * 2


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="local must be"):
        ConViT(**{**TINY, "local": 3})
    with pytest.raises(TypeError, match="class_token"):
        ConViT(**TINY, class_token=True)
    with pytest.raises(ValueError, match="layers must lie"):
        ConViT(**TINY).forward_features(torch.randn(1, 3, 32, 32), layers=(3,))
    with pytest.raises(ValueError, match="multiples of patch=8"):
        ConViT(**TINY)(torch.randn(1, 3, 30, 32))
