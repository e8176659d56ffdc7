"""SpaRTAN: waves that turn, where groups change sides, fresh blocks, and folding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlab.models.vision.spartan import SpaRTAN, SpartanBlock
from attnlab.nn.channel.wave import WaveMixer
from attnlab.nn.spatial.smixer import SMixer

TINY = {"dims": (8, 16, 16, 24), "depths": (1, 1, 2, 1), "ratios": (2, 2, 2, 2), "num_classes": 5}


def shaken(net: nn.Module) -> nn.Module:
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if "running_var" in name else nn.init.normal_(tensor, std=0.3)
    return net.eval()


def test_waves_equal_their_formula():
    module = shaken(WaveMixer(8, ratio=2)).double()
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    seen = {}
    module.conv.register_forward_pre_hook(lambda _, inputs: seen.update(h=inputs[0]))
    module(x)
    z = torch.complex(*module.turn.unbind(1))
    for b, i, j in ((0, 0, 0), (1, 2, 3)):
        place = x[b, :, i, j]
        t, w = F.linear(place, module.wtp.weight, module.wtp.bias).split(16)
        t, m = F.gelu(t), int(place.argmax())
        assert m < 8  # of the first C of E channels
        f = w * t + w[m] * t[m]
        h = torch.complex(f[0::2], f[1::2]) * z
        torch.testing.assert_close(seen["h"][b, 0::2, i, j], h.real)
        torch.testing.assert_close(seen["h"][b, 1::2, i, j], h.imag)


def test_a_turn_scales_each_pair_and_a_turn_of_one_does_nothing():
    module, x = WaveMixer(8, ratio=2).double().eval(), torch.randn(1, 8, 3, 3, dtype=torch.float64)
    seen = {}
    module.conv.register_forward_pre_hook(lambda _, inputs: seen.update(h=inputs[0].movedim(1, -1)))
    f = module.waves(x.movedim(1, -1))
    module(x)
    norms = [t.unflatten(-1, (8, 2)).norm(dim=-1) for t in (seen["h"], f)]
    torch.testing.assert_close(norms[0], norms[1] * module.turn.norm(dim=-1))
    module.turn.data.copy_(torch.tensor([1.0, 0.0]))
    module(x)
    torch.testing.assert_close(seen["h"], f)


def test_groups_change_sides_in_the_second_half():
    early, late = SpartanBlock(16, ratio=4, late=False), SpartanBlock(16, ratio=4, late=True)
    assert (early.mixer.near.conv.groups, early.wave.conv.conv.groups) == (1, 64)
    assert (late.mixer.near.conv.groups, late.wave.conv.conv.groups) == (8, 16)
    stages = SpaRTAN(**TINY).stages
    assert [stage.blocks[0].mixer.far1.groups for stage in stages] == [1, 1, 8, 12]


def test_without_its_gain_the_boost_of_differences_is_gone():
    mixer, x = shaken(SMixer(8)).double(), torch.randn(1, 8, 4, 4, dtype=torch.float64)
    nn.init.zeros_(mixer.gamma)
    p = mixer.proj(x.movedim(1, -1)).movedim(-1, 1)
    y = torch.cat((mixer.near_se(mixer.near(p)), mixer.far_se(mixer.far2(mixer.far1(p)))), 1)
    torch.testing.assert_close(mixer(x), mixer.wo(y.movedim(1, -1)).movedim(-1, 1))


def test_blocks_whose_scales_are_zero_are_the_identity():
    block, x = SpartanBlock(16, ratio=2, late=True), torch.randn(2, 16, 4, 4)
    nn.init.zeros_(block.scale1)
    nn.init.zeros_(block.scale2)
    assert torch.equal(block(x), x)


def test_paths_are_dropped_more_often_block_by_block():
    net = SpaRTAN(**TINY, drop_path=0.5)
    rates = [block.drop_path.rate for stage in net.stages for block in stage.blocks]
    assert rates == pytest.approx([0.5 * i / 5 for i in range(5)])  # the authors' rates stay below the given one


def test_folded_it_is_the_same_network():
    net = shaken(SpaRTAN(**TINY)).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    folded = copy.deepcopy(net).fuse()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), net(x), rtol=1e-9, atol=1e-9)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="dim must be a multiple of 8, got 12"):
        SMixer(12)
    with pytest.raises(ValueError, match="ratio must be at least 1 and give an even number of channels, got 1 × 5"):
        WaveMixer(5, ratio=1)
    with pytest.raises(ValueError, match=r"ratios need one entry per stage \(4\), got 2"):
        SpaRTAN(ratios=(2, 2))
    with pytest.raises(ValueError, match="dim must be at least 4"):
        WaveMixer(2)
