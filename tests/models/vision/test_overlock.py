"""OverLoCK: the paper's parameters and cost, its two outputs, merging for inference, any image size."""

import copy

import pytest
import torch
from torch import nn

import attnlab
from attnlab.cost import count_flops
from attnlab.models.vision.context_block import GlobalResponseNorm, PlusConv
from attnlab.models.vision.overlock import OverLoCK
from attnlab.nn.reparam import DilatedReparam

# Parameters in millions (branches merged, no auxiliary head) and GFLOPs (multiply-adds) at 224×224, arXiv 2502.20087.
PUBLISHED = {
    "overlock_xt": (16.454, 2.6),
    "overlock_t": (33.467, 5.5),
    "overlock_s": (56.156, 9.7),
    "overlock_b": (94.943, 16.7),
}
TINY = {
    "dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "focus_depths": (2, 1), "heads": (2, 2), "kernels": (7, 5, 5, 5),
    "small": 3, "mlp_ratios": (1, 1, 1, 1), "focus_mlp_ratios": (1, 1), "projection": 24, "num_classes": 5,
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["overlock_xt", *(pytest.param(n, marks=pytest.mark.slow) for n in list(PUBLISHED)[1:])]
)
def test_merged_it_has_the_papers_parameters_and_cost(name):
    with torch.device("meta"), torch.no_grad():
        net = attnlab.build(name, auxiliary=False).eval()
        norms = 0
        for module in net.modules():
            if isinstance(module, DilatedReparam):
                module.fuse()
                norms += 2 * len(module.large.weight)  # a batch norm that the authors leave and that is merged here
        flops = count_flops(net, torch.randn(1, 3, 224, 224))
    millions, giga = PUBLISHED[name]
    assert (sum(p.numel() for p in net.parameters()) + norms) / 1e6 == pytest.approx(millions, abs=5e-4)
    assert flops / 2e9 == pytest.approx(giga, rel=0.04)


def shaken(net: nn.Module) -> nn.Module:
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if "running_var" in name else nn.init.normal_(tensor, std=0.3)
    return net.double().eval()


def test_merged_it_is_the_same_network():
    net, x = shaken(OverLoCK(**TINY)), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    merged = copy.deepcopy(net).fuse()
    torch.testing.assert_close(merged(x), net(x), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(merged.fuse()(x), net(x), rtol=1e-8, atol=1e-8)
    left = [n for n, m in merged.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert all("fuse_context" in n or n == "second_norm" for n in left)
    with pytest.raises(ValueError, match=r"needs eval\(\)"):
        net.train().fuse()


def test_training_gives_the_overviews_logits_too():
    net, x = OverLoCK(**TINY), torch.randn(2, 3, 64, 64)
    assert [y.shape for y in net(x)] == [(2, 5), (2, 5)]
    assert net.eval()(x).shape == (2, 5)
    assert OverLoCK(**TINY, auxiliary=False)(x).shape == (2, 5)


def test_the_overview_guides_both_focus_stages():
    net = shaken(OverLoCK(**TINY))
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    before = net.forward_features(x)
    nn.init.normal_(net.keep.bias, mean=3.0)
    after = net.forward_features(x)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, False]


@pytest.mark.parametrize("size", [(32, 32), (70, 97)])
def test_takes_any_image_size(size):
    net = OverLoCK(**TINY).eval()
    assert net(torch.randn(1, 3, *size)).shape == (1, 5)
    shapes = [tuple(m.shape[1:]) for m in net.forward_features(torch.randn(1, 3, *size))]
    assert shapes == [
        (c, -(-size[0] // r), -(-size[1] // r)) for c, r in zip(net.channels, net.reductions, strict=True)
    ]


def test_a_convolution_adds_the_map_itself():
    conv, x = PlusConv(4).double(), torch.randn(1, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(conv(x), x + nn.functional.conv2d(x, conv.weight, conv.bias, padding=1, groups=4))


def test_fresh_response_norms_are_the_identity():
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(GlobalResponseNorm(4)(x), x)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="need four entries, got 3, 4, 4, 4 and 4"):
        OverLoCK(dims=(8, 8, 8))
    with pytest.raises(ValueError, match="need two entries, got 3, 2 and 2"):
        OverLoCK(focus_depths=(1, 1, 1))
    with pytest.raises(ValueError, match="dims must end with a multiple of 4, got 18"):
        OverLoCK(dims=(8, 8, 16, 18))
    with pytest.raises(ValueError, match="at least 32 pixels"):
        OverLoCK(**TINY)(torch.randn(1, 3, 16, 40))
