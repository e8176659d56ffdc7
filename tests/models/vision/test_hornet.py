"""HorNet: the paper's cost, the head's order, any image size, other orders."""

import pytest
import torch

import attnlab
from attnlab.cost import count_flops
from attnlab.models.skeletons.pyramid import Pyramid, around
from attnlab.models.vision.hornet import SIZES, HorNet

# GFLOPs (multiply-adds) at 224×224, arXiv 2207.14284.
PUBLISHED = {"hornet_tiny_7x7": 4.0, "hornet_small_7x7": 8.8, "hornet_base_7x7": 15.6, "hornet_large_7x7": 34.8}
TINY = {"dim": 8, "depths": (1, 1, 1, 1), "orders": (1, 2, 3, 4), "num_classes": 5}


@pytest.mark.parametrize("name", PUBLISHED)
def test_costs_what_the_paper_says(name):
    with torch.device("meta"), torch.no_grad():
        flops = count_flops(attnlab.build(name).eval(), torch.randn(1, 3, 224, 224))
    assert flops / 2e9 == pytest.approx(PUBLISHED[name], rel=0.015)


def test_global_filters_have_the_size_of_the_spectrum_of_their_images():
    for name, image in (("hornet_tiny_gf", 224), ("hornet_large_gf_384", 384)):
        spectra = SIZES[name].arguments["spectra"]
        assert spectra == (None, None, *((image // s, image // s // 2 + 1) for s in (16, 32)))


def test_the_norm_comes_after_the_mean():
    net, x = HorNet(**TINY).eval(), torch.randn(2, 3, 32, 64)
    torch.testing.assert_close(net(x), net.head(net.norm(net.forward_features(x)[-1].mean((2, 3)))))


@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
def test_takes_any_image_size(size):
    net = HorNet(**TINY, spectra=(None, None, (2, 2), (1, 1))).eval()
    assert net(torch.randn(1, 3, *size)).shape == (1, 5)
    wanted = [(size[0] // r, size[1] // r) for r in (4, 8, 16, 32)]
    assert [tuple(m.shape[2:]) for m in net.forward_features(torch.randn(1, 3, *size))] == wanted


def test_the_convolution_mixes_an_isotropic_network_too():
    net = Pyramid(dims=(16,), depths=(2,), strides=(16,), block=around("gnconv", options={"order": 3}), num_classes=5)
    assert net(torch.randn(1, 3, 48, 32)).shape == (1, 5)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"orders and spectra need one entry per stage \(2\), got 4 and 2"):
        HorNet(depths=(1, 1))
