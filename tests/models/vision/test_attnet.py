"""AttNet: its gated MLP, folding for inference, any image size."""

import copy

import pytest
import torch
from torch import nn

import attnlab
from attnlab.models.skeletons.convglu import ConvGLU
from attnlab.models.vision.attnet import AttNet, glu_width

TINY = {"dims": (8, 12, 16, 20), "depths": (1, 1, 1, 1), "ratios": (2, 2, 2, 2), "num_classes": 5}


def shaken(net: nn.Module) -> nn.Module:
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if "running_var" in name else nn.init.normal_(tensor, std=0.3)
    return net.double().eval()


def test_the_gated_mlp_has_an_rms_norm_before_its_last_layer():
    mlp, x = shaken(ConvGLU(4, 6, norm=True)), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    u, v = mlp.fc1(x).split(6, -1)
    u = nn.functional.conv2d(u.permute(0, 3, 1, 2), mlp.conv.weight, mlp.conv.bias, padding=1, groups=6)
    h = nn.functional.gelu(u).permute(0, 2, 3, 1) * v
    h = h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * mlp.norm.weight
    torch.testing.assert_close(mlp(x), mlp.fc2(h))


def test_hidden_widths_are_rounded_down_twice():
    assert [glu_width(dim, ratio) for dim, ratio in ((16, 2.0), (11, 1.5), (240, 4))] == [21, 10, 640]


def test_named_sizes_have_the_norms_and_scales_of_their_family():
    with torch.device("meta"):
        small, large = attnlab.build("attnet_xxs"), attnlab.build("attnet_t1")
    assert small.stages[0].blocks[0].scale1 is None and isinstance(small.stages[0].blocks[0].mlp.norm, nn.Identity)
    assert large.stages[0].blocks[0].scale1 is not None and isinstance(large.stages[0].blocks[0].mlp.norm, nn.RMSNorm)


def test_folded_it_is_the_same_network():
    net, x = shaken(AttNet(**TINY)), torch.randn(2, 3, 64, 40, dtype=torch.float64)
    folded = copy.deepcopy(net).fuse()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), net(x), rtol=1e-9, atol=1e-9)


def test_the_norm_comes_after_the_mean():
    net, x = AttNet(**TINY).eval(), torch.randn(2, 3, 32, 64)
    torch.testing.assert_close(net(x), net.head(net.norm(net.forward_features(x)[-1].mean((2, 3)))))


@pytest.mark.parametrize("size", [(32, 32), (45, 70)])
def test_takes_any_image_size(size):
    net = AttNet(**TINY).eval()
    assert net(torch.randn(1, 3, *size)).shape == (1, 5)
    wanted = [(-(-size[0] // r), -(-size[1] // r)) for r in (4, 8, 16, 32)]
    assert [tuple(m.shape[2:]) for m in net.forward_features(torch.randn(1, 3, *size))] == wanted


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"one entry per stage \(4\), got 3, 4, 4 and 4"):
        AttNet(ratios=(4, 4, 4))
