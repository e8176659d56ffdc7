"""FocalNet: the authors' sizes and cost, timm's network as a peer, any image size, training on real digits."""

import pytest
import torch
from torch import nn

import attnlab
from attnlab.cost import count_flops
from attnlab.hub.official.focalnet import FocalNet as Official
from attnlab.hub.official.focalnet import TimmFocalNet
from attnlab.models.vision.focalnet import SIZES, FocalNet

# GFLOPs (multiply-adds) at 224×224, arXiv 2203.11926 tables 2 and 3; they round to one decimal.
PUBLISHED = {
    "focalnet_tiny_srf": 4.4,
    "focalnet_tiny_lrf": 4.5,
    "focalnet_small_srf": 8.6,
    "focalnet_small_lrf": 8.7,
    "focalnet_base_srf": 15.3,
    "focalnet_base_lrf": 15.4,
    "focalnet_tiny_iso": 1.1,
    "focalnet_small_iso": 4.3,
    "focalnet_base_iso": 16.9,
}
# Millions of parameters in the authors' tables; the exact counts of `SIZES` are checked with every card.
MILLIONS = {"tiny_srf": 28.4, "small_lrf": 50.3, "base_lrf": 88.7, "large_fl3": 207, "xlarge_fl4": 366, "huge_fl3": 687}


@pytest.mark.parametrize("name", PUBLISHED)
def test_costs_what_the_paper_says(name):
    with torch.device("meta"), torch.no_grad():
        net = attnlab.build(name)
        flops = count_flops(net, torch.randn(1, 3, 224, 224))
    assert flops / 2e9 == pytest.approx(PUBLISHED[name], abs=0.11)


def test_sizes_are_those_of_the_authors_tables():
    for name, millions in MILLIONS.items():
        assert SIZES[f"focalnet_{name}"].params / 1e6 == pytest.approx(millions, abs=0.5)


def test_build_takes_a_sizes_name_and_overrides():
    with torch.device("meta"):
        net = attnlab.build("focalnet_small_lrf", num_classes=7)
    assert net.head.weight.shape == (7, 768)
    assert [len(stage.blocks) for stage in net.stages] == [2, 2, 18, 2]
    assert [conv.kernel_size[0] for conv in net.stages[0].blocks[0].mixer.convs] == [3, 5, 7]


TINY = {"dim": 8, "depths": (1, 2), "num_classes": 5}


@pytest.mark.parametrize("size", [(32, 32), (37, 51), (8, 90)])
@pytest.mark.parametrize("overlap", [False, True])
def test_takes_any_image_size(size, overlap):
    net = FocalNet(**TINY, overlap=overlap)
    assert net(torch.randn(1, 3, *size)).shape == (1, 5)
    assert [m.shape[1] for m in net.forward_features(torch.randn(1, 3, *size))] == [8, 16]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"levels must be one number or one per stage \(2\), got 3"):
        FocalNet(**TINY, levels=(1, 2, 3))
    with pytest.raises(ValueError, match="patch must be 4 with overlap=True"):
        FocalNet(**TINY, patch=16, overlap=True)


LARGE = {
    "use_overlap_down": True,
    "use_post_norm": True,
    "use_post_norm_in_modulation": True,
    "normalize_modulator": True,
    "layerscale_value": 0.3,
}


@pytest.mark.parametrize("flags", [{}, LARGE], ids=["plain", "large"])
def test_equals_timms_network(timm, flags):
    from timm.models.focalnet import FocalNet as Peer

    arguments = {"embed_dim": 8, "depths": (1, 2), "num_classes": 5, "focal_levels": (2, 3), "focal_windows": (3, 5)}
    peer = Peer(**arguments, **flags).eval()
    for p in peer.parameters():
        nn.init.normal_(p, mean=0.0 if p.ndim > 1 else 0.5, std=0.2)
    net = TimmFocalNet.build({**arguments, **flags}, peer.state_dict()).eval()
    x = torch.randn(2, 3, 40, 56, requires_grad=True)
    torch.testing.assert_close(net(x), peer(x), rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(m(x).pow(2).sum(), x)[0] for m in (net, peer))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_the_authors_checkpoints_load_by_their_names():
    with torch.device("meta"):
        net = attnlab.build("focalnet_large_fl4")
    ours = net.state_dict()
    theirs = {}
    for name, p in ours.items():  # the authors' layout, written out backwards
        name = name.replace("stem.conv", "patch_embed.proj").replace("stem.norm", "patch_embed.norm")
        if "downsample" in name:
            _, stage, rest = name.split(".", 2)
            name = f"layers.{int(stage) - 1}.{rest.replace('conv', 'proj')}"
        name = name.replace("stages.", "layers.").replace("mixer.", "modulation.").replace("scale", "gamma_")
        name = name.replace(".wqcg.", ".f.").replace(".wm.", ".h.").replace(".wo.", ".proj.")
        if ".convs." in name:
            name = name.replace("convs", "focal_layers").replace(".weight", ".0.weight")
        theirs[name] = p[:, :, None, None] if name.endswith(".h.weight") else p
    assert {n: p.shape for n, p in Official.rename(theirs).items()} == {n: p.shape for n, p in ours.items()}
