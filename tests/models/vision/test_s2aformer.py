"""S2AFormer: the block's order, its options, folding for inference, any image size."""

import copy

import pytest
import torch
from torch import nn

from attnlab.models.vision.s2aformer import HybridBlock, S2AFormer
from attnlab.nn.spatial.strip import LocalInteraction, StripAttention

TINY = {"dims": (16, 24), "depths": (1, 1), "heads": (2, 4), "ratios": (2, 1), "num_classes": 5}


def test_the_block_goes_from_near_to_far_to_near():
    block, x = HybridBlock(8, StripAttention(8, heads=2, ratio=2)), torch.randn(2, 8, 4, 6)
    conv = block.place
    x1 = x + nn.functional.conv2d(x, conv.weight, conv.bias, padding=1, groups=8)  # no norm before it
    x2 = x1 + block.mixer(block.norm1(x1.flatten(2).mT), grid=(4, 6)).mT.view(x.shape)
    x3 = x2 + block.local(block.norm2(x2.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    x4 = x3 + block.mlp(block.norm3(x3.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x), x4)


@pytest.mark.parametrize("lim", ["gated", "plain", "none"])
def test_the_local_interaction_can_be_left_out(lim):
    net = S2AFormer(**TINY, lim=lim).eval()
    gates = [m.gate for m in net.modules() if isinstance(m, LocalInteraction)]
    assert len(gates) == (0 if lim == "none" else 2)
    assert all(isinstance(gate, nn.Identity) is (lim == "plain") for gate in gates)
    assert net(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_folded_it_is_the_same_network():
    net = S2AFormer(**TINY).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2.0)
    x = torch.randn(2, 3, 33, 40, dtype=torch.float64)
    folded = copy.deepcopy(net).fuse()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), net(x))


@pytest.mark.parametrize("size", [(32, 32), (37, 51), (9, 70)])
def test_takes_any_image_size(size):
    net = S2AFormer(**TINY).eval()
    assert net(torch.randn(1, 3, *size)).shape == (1, 5)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="lim must be one of gated, plain, none, got 'both'"):
        S2AFormer(lim="both")
    with pytest.raises(ValueError, match="dims, heads and ratios need one entry per stage, got 4, 2 and 4"):
        S2AFormer(heads=(1, 2))
