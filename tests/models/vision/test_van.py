"""VAN: the paper's cost, its block written out, folding for inference, any image size."""

import copy

import pytest
import torch
from torch import nn

import attnlab
from attnlab.cost import count_flops
from attnlab.models.vision.van import VAN, LargeKernelBlock

# GFLOPs (multiply-adds) at 224×224, arXiv 2202.09741, which counts norms too.
PUBLISHED = {"van_b0": 0.9, "van_b1": 2.5, "van_b2": 5.0, "van_b3": 9.0}
TINY = {"dims": (8, 8, 12, 16), "depths": (1, 1, 2, 1), "mlp_ratios": (2, 2, 2, 2), "num_classes": 5}


@pytest.mark.parametrize("name", PUBLISHED)
def test_costs_what_the_paper_says(name):
    with torch.device("meta"), torch.no_grad():
        flops = count_flops(attnlab.build(name).eval(), torch.randn(1, 3, 224, 224))
    assert flops / 2e9 == pytest.approx(PUBLISHED[name], abs=0.08)


def shaken(net: nn.Module) -> nn.Module:
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if "running_var" in name else nn.init.normal_(tensor, std=0.3)
    return net.double().eval()


def test_the_blocks_inner_residual_adds_the_normed_map():
    block, x = shaken(LargeKernelBlock(6, mlp_ratio=2)), torch.randn(2, 6, 5, 7, dtype=torch.float64)

    def pointwise(layer, x):
        return torch.einsum("dc,bchw->bdhw", layer.weight, x) + layer.bias[:, None, None]

    y = block.norm1(x)
    z = nn.functional.gelu(pointwise(block.mixer.wi, y))
    y = y + pointwise(block.mixer.wo, z * block.mixer.lka.gate(z))
    x1 = x + block.scale1[:, None, None] * y
    z = nn.functional.gelu(block.mlp.dwconv(pointwise(block.mlp.fc1, block.norm2(x1))))
    wanted = x1 + block.scale2[:, None, None] * pointwise(block.mlp.fc2, z)
    torch.testing.assert_close(block(x), wanted)


def test_folded_it_is_the_same_network():
    net, x = shaken(VAN(**TINY)), torch.randn(2, 3, 64, 40, dtype=torch.float64)
    folded = copy.deepcopy(net).fuse()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), net(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(folded.fuse()(x), net(x), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"fuse needs eval\(\)"):
        net.train().fuse()


@pytest.mark.parametrize("size", [(32, 32), (45, 70)])
def test_takes_any_image_size(size):
    net = VAN(**TINY).eval()
    assert net(torch.randn(1, 3, *size)).shape == (1, 5)
    wanted = [(-(-size[0] // r), -(-size[1] // r)) for r in (4, 8, 16, 32)]
    assert [tuple(m.shape[2:]) for m in net.forward_features(torch.randn(1, 3, *size))] == wanted


def test_fresh_weights_are_scaled_by_what_leaves_a_layer():
    torch.manual_seed(0)
    net = VAN(dims=(64, 64), depths=(1, 1), mlp_ratios=(4, 4))
    block = net.stages[0].blocks[0]
    for weight, fan_out in (
        (net.stem.conv.weight, 49 * 64),
        (block.mixer.lka.far.weight, 49),
        (block.mixer.wi.weight, 64),
    ):
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    assert torch.equal(block.scale1, torch.full((64,), 0.01))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"mlp_ratios needs one entry per stage \(3\), got 4"):
        VAN(dims=(8, 8, 8), depths=(1, 1, 1))
    with pytest.raises(ValueError, match="at least 32 pixels"):
        VAN(**TINY)(torch.randn(1, 3, 16, 40))
