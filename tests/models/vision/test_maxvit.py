"""MaxViT: the paper's cost, timm's network as a peer, any image size, another window, receptive field."""

import pytest
import torch
from torch import nn

import attnlab
from attnlab.cost import count_flops
from attnlab.hub.official.maxvit import MaxxVit as Official
from attnlab.models.skeletons.mbconv import MBConv, SameConv
from attnlab.models.vision.maxvit import MaxViT

# GFLOPs (multiply-adds) at 224×224, as the authors give them.
PUBLISHED = {"maxvit_tiny": 5.6, "maxvit_base": 24.2}


@pytest.mark.parametrize("name", PUBLISHED)
def test_costs_what_the_paper_says(name):
    with torch.device("meta"), torch.no_grad():
        flops = count_flops(attnlab.build(name).eval(), torch.randn(1, 3, 224, 224))
    assert flops / 2e9 == pytest.approx(PUBLISHED[name], rel=0.05)


def test_the_largest_has_the_papers_size_and_timms_with_its_classes():
    with torch.device("meta"):
        net = attnlab.build("maxvit_xlarge", num_classes=21_843)
    assert sum(p.numel() for p in net.parameters()) == 506_987_643


TINY = {"dim": 8, "depths": (1, 2), "stem_dim": 8, "window": 2, "head_dim": 4, "num_classes": 5}


def timms(timm, image: int) -> nn.Module:
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, _tf_cfg

    cfg = MaxxVitCfg(
        embed_dim=(8, 16), depths=(1, 2), block_type=("M", "M"), stem_width=8, stem_bias=True, head_hidden_size=16,
        **_tf_cfg(),
    )  # fmt: skip
    peer = MaxxVit(cfg, img_size=image, num_classes=5, transformer_dim_head=4, transformer_partition_ratio=8).eval()
    for name, p in [*peer.named_parameters(), *peer.named_buffers()]:
        if p.is_floating_point() and "lookup" not in name:
            nn.init.uniform_(p, 0.5, 1.5) if "running_var" in name else nn.init.normal_(p, 0.0, 0.3)
    return peer


@pytest.mark.parametrize("image", [16, 24])
def test_equals_timms_network(timm, image):
    peer = timms(timm, image)
    net = Official.build({}, peer.state_dict()).eval()
    x = torch.randn(2, 3, image, image, requires_grad=True)
    ours, theirs = net(x), peer(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(y.pow(2).sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_trains_as_timms_network(timm):
    peer = timms(timm, 16)
    net = Official.build({}, peer.state_dict())
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(net.train()(x), peer.train()(x), rtol=1e-3, atol=1e-4)
    # As in the authors' code, and unlike timm's, a batch moves the running statistics by a hundredth.
    before, after = peer.state_dict()["stages.0.blocks.0.conv.norm1.num_batches_tracked"], net.stages[0].blocks[0].conv
    assert before == after.norm1.num_batches_tracked == 1 and after.norm1.momentum == 0.01


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (8, 40)])
def test_takes_any_image_size(size):
    net = MaxViT(**TINY).eval()
    x = torch.randn(2, 3, *size)
    assert net(x).shape == (2, 5)
    torch.testing.assert_close(net(x)[1:], net(x[1:]), rtol=1e-4, atol=1e-5)


def test_a_fused_network_gives_the_same():
    net = MaxViT(**TINY).double()
    for name, p in [*net.named_parameters(), *net.named_buffers()]:
        if p.is_floating_point():
            nn.init.uniform_(p, 0.5, 1.5) if "running_var" in name else nn.init.normal_(p, 0.0, 0.3)
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    before = net.eval()(x)
    torch.testing.assert_close(net.fuse().fuse()(x), before)
    left = [name for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert left == ["stem.norm"]


@pytest.mark.parametrize("size", [4, 5])
def test_an_odd_pixel_of_padding_goes_below_and_right(size):
    conv = SameConv(1, 1, 3, 2, bias=False)
    x = torch.randn(1, 1, size, size)
    first = 0 if size == 4 else -1
    wanted = sum(
        conv.weight[0, 0, i, j] * x[0, 0, 2 + first + i, 2 + first + j] for i in range(3) for j in range(3)
        if 2 + first + i < size and 2 + first + j < size
    )  # fmt: skip
    torch.testing.assert_close(conv(x)[0, 0, 1, 1], wanted)
    assert conv(x).shape[-1] == -(-size // 2)


def test_another_window_makes_no_difference_to_flat_biases():
    net = MaxViT(**TINY).eval()
    for name, p in net.named_parameters():
        if name.endswith("relative.table"):
            nn.init.constant_(p, 0.7)
    x = torch.randn(1, 3, 8, 8)
    before = net.stages[0](net.stem(x))
    net.rewindow(4)  # maps of 2×2: the window is what there is of it
    net.rewindow(2)
    torch.testing.assert_close(net.stages[0](net.stem(x)), before)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="head_dim must divide the width 8, got 3"):
        MaxViT(**{**TINY, "head_dim": 3})
    with pytest.raises(ValueError, match="stride must be 1 or 2, got 3"):
        MBConv(8, 8, stride=3)
    with pytest.raises(ValueError, match="input_dim must be dim where stride is 1, got 4 and 8"):
        MBConv(4, 8)


@pytest.mark.parametrize("stride", [1, 2])
def test_norms_on_the_way_into_the_weights_change_nothing(stride):
    block = MBConv(4, 8 if stride > 1 else 4, stride=stride).double()
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        block(x + 1)  # statistics that are not those of the beginning
    wanted = block.eval()(x)
    with torch.no_grad():
        assert block.folds(x)
        torch.testing.assert_close(block(x), wanted.detach())
