"""SHViT: the paper's cost, timm's network as a peer, folding for inference, fresh blocks, any image size."""

import copy

import pytest
import torch
from torch import nn

import attnlab
from attnlab.cost import count_flops
from attnlab.hub.official.shvit import SHViT as Official
from attnlab.models.vision.shvit import SHViT, SingleHeadBlock
from attnlab.nn.conv_norm import ConvNorm, fold_norms
from attnlab.nn.spatial.single_head import SingleHeadAttention

# Millions of multiply-adds at 224×224, as the paper gives them (its largest is for 256×256).
PUBLISHED = {"shvit_s1": (224, 241), "shvit_s2": (224, 366), "shvit_s3": (224, 601), "shvit_s4": (256, 986)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_costs_what_the_paper_says(name):
    size, published = PUBLISHED[name]
    with torch.device("meta"), torch.no_grad():
        flops = count_flops(attnlab.build(name).eval(), torch.randn(1, 3, size, size))
    assert flops / 2e6 == pytest.approx(published, rel=0.02)


TINY = {"embed_dim": (16, 20, 24), "depth": (1, 1, 2), "partial_dim": (4, 6, 8), "types": ("i", "s", "s")}


def shaken(net: nn.Module) -> nn.Module:
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if "running_var" in name else nn.init.normal_(tensor, std=0.3)
    return net.eval()


@pytest.mark.parametrize("size", [(64, 64), (70, 97)])
def test_equals_timms_network(timm, size):
    from timm.models.shvit import SHViT as Peer

    peer = shaken(Peer(num_classes=5, **TINY))
    net = Official.build({"num_classes": 5, **TINY}, peer.state_dict())
    x = torch.randn(2, 3, *size, requires_grad=True)
    ours, theirs = net(x), peer(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    ours, theirs = (torch.autograd.grad(y.pow(2).sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5 * theirs.abs().max().item())


def test_loads_timms_sizes(timm):
    with torch.device("meta"):
        for name in ("shvit_s1", "shvit_s4"):
            peer, net = timm.create_model(name), attnlab.build(name)
            theirs = {n: t.shape for n, t in Official.rename(peer.state_dict()).items()}
            assert theirs == {n: t.shape for n, t in net.state_dict().items()}


@pytest.mark.parametrize("distilled", [False, True])
def test_folded_it_is_the_same_network(distilled):
    net = SHViT(dims=(16, 20, 24), depths=(1, 1, 1), widths=(4, 6, 8), distilled=distilled, num_classes=5)
    net, x = shaken(net).double(), torch.randn(2, 3, 64, 80, dtype=torch.float64)
    folded = copy.deepcopy(net).fuse()
    assert not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in folded.modules())
    torch.testing.assert_close(folded(x), net(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(folded.fuse()(x), net(x), rtol=1e-9, atol=1e-9)


def test_folding_in_training_is_refused():
    with pytest.raises(ValueError, match=r"fold_norms needs eval\(\)"):
        fold_norms(ConvNorm(4, 4))


def test_a_fresh_block_is_the_identity():
    block, x = SingleHeadBlock(12, SingleHeadAttention(12)), torch.randn(4, 12, 5, 6)
    torch.testing.assert_close(block(x), x)


def test_two_heads_are_averaged_in_evaluation_and_apart_in_training():
    net = shaken(SHViT(dims=(16, 20), depths=(1, 1), widths=(4, 6), attends=(False, True), distilled=True))
    x = torch.randn(2, 3, 64, 64)
    pooled = net.forward_features(x)[-1].mean((2, 3))
    both = net.head(net.head_norm(pooled)) + net.second_head(net.second_norm(pooled))
    torch.testing.assert_close(net(x), both / 2)
    assert [y.shape for y in net.train()(x)] == [(2, 1000), (2, 1000)]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="dims, widths, key_dim and attends need one entry per stage, got 3, 2, 3"):
        SHViT(widths=(4, 4))
    with pytest.raises(ValueError, match="dims must begin with a multiple of 8, got 12"):
        SHViT(dims=(12, 24, 48))
    with pytest.raises(ValueError, match="at least 64 pixels"):
        SHViT(dims=(16, 20, 24), depths=(1, 1, 1), widths=(4, 6, 8))(torch.randn(1, 3, 48, 48))
