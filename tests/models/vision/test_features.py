"""A backbone as a source of maps for other heads."""

import pytest
import torch

import attnlab
from attnlab.models.skeletons.features import Features


def test_maps_have_the_promised_channels_and_strides():
    backbone = attnlab.build("focalnet", features_only=True, dim=16, depths=(1, 1, 1))
    maps = backbone(torch.randn(2, 3, 64, 48))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 16, 12), (2, 32, 8, 6), (2, 64, 4, 3)]
    assert backbone.channels == (16, 32, 64) and backbone.reductions == (4, 8, 16)


def test_out_indices_choose_and_order_the_maps():
    backbone = attnlab.build("focalnet", features_only=True, out_indices=(-1, 0), dim=16, depths=(1, 1, 1))
    coarse, fine = backbone(torch.randn(1, 3, 32, 32))
    assert (coarse.shape[1], fine.shape[1]) == backbone.channels == (64, 16)
    assert backbone.reductions == (16, 4)


def test_maps_are_those_of_the_network_and_train_every_parameter():
    torch.manual_seed(0)
    network = attnlab.build("focalnet", dim=16, depths=(1, 1), num_classes=0)
    x = torch.randn(2, 3, 32, 32)
    wanted = network.forward_features(x)
    backbone = Features(network)
    for found, want in zip(backbone(x), wanted, strict=True):
        torch.testing.assert_close(found, want)
    sum(m.pow(2).sum() for m in backbone(x)).backward()
    assert not [n for n, p in backbone.named_parameters() if p.grad is None]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"features_only": True, "out_indices": (9,)}, "out_indices must name some of the 4 maps"),
        ({"out_indices": (0,)}, "goes with features_only"),
    ],
)
def test_bad_arguments_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        attnlab.build("focalnet", **arguments)


def test_only_backbones_have_features():
    with pytest.raises(ValueError, match="'gated' is of kind 'tokens'"):
        attnlab.build("gated", features_only=True)
