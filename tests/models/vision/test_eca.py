"""ECA-ResNet and ECA-MobileNetV2: what attention adds, where it stands, any image size."""

import pytest
import torch

import attnlab
from attnlab.models.vision.ecamobilenet import ECAMobileNetV2
from attnlab.models.vision.ecaresnet import SIZES, ECAResNet, ResidualBlock
from attnlab.nn.channel.eca import EfficientChannelAttention

# Parameters of the plain networks (torchvision's documentation), and the weights that attention adds (arXiv 1910.03151:
# 80 in ResNet-50; the others follow from the released kernels and the depths).
PLAIN = {
    "eca_resnet18": (11_689_512, 44),
    "eca_resnet34": (21_797_672, 72),
    "eca_resnet50": (25_557_032, 80),
    "eca_resnet101": (44_549_160, 157),
    "eca_resnet152": (60_192_808, 234),
    "eca_mobilenetv2": (3_504_872, 31),
}


def gates(net):
    return [m for m in net.modules() if isinstance(m, EfficientChannelAttention)]


@pytest.mark.parametrize("name", PLAIN)
def test_attention_adds_a_few_dozen_weights_to_the_plain_network(name):
    with torch.device("meta"):
        net = attnlab.build(name)
    added = sum(m.weight.numel() for m in gates(net))
    total = sum(p.numel() for p in net.parameters())
    assert (total - added, added) == PLAIN[name]


def test_the_closed_form_differs_from_the_released_kernels_in_resnet50():
    with torch.device("meta"):
        net = attnlab.build("eca_resnet50", kernels=None)
    assert [gates(stage)[0].kernel for stage in net.stages] == [5, 5, 5, 7]
    assert sum(m.weight.numel() for m in gates(net)) == 86


def test_gates_stand_on_the_blocks_output_width():
    with torch.device("meta"):
        net = attnlab.build("eca_resnet50")
        mobile = ECAMobileNetV2()
    assert [gates(stage)[0].dim for stage in net.stages] == [256, 512, 1024, 2048]
    assert [gates(stage)[0].kernel for stage in mobile.stages] == [1, 1, 1, 1, 3, 3, 3]


@pytest.mark.parametrize(
    "net", [ECAResNet(depths=(1, 1, 1, 1), dim=4, num_classes=5), ECAMobileNetV2(width=0.25, num_classes=5)]
)
@pytest.mark.parametrize("size", [(64, 64), (33, 47)])
def test_takes_any_image_size(net, size):
    net.eval()
    x = torch.randn(2, 3, *size)
    assert net(x).shape == (2, 5)
    maps = net.forward_features(x)
    for m, channels, reduction in zip(maps, net.channels, net.reductions, strict=True):
        assert m.shape == (2, channels, *(-(-side // reduction) for side in size))


def test_with_zero_weights_each_branch_is_halved():
    net = ECAResNet(depths=(1,), kernels=(3,), dim=4, bottleneck=False, num_classes=5).eval()
    block = net.stages[0].blocks[0]
    torch.nn.init.zeros_(block.gate.weight)
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(block(x), torch.relu(x + block.convs(x) / 2))


def test_kernels_must_fit_the_stages():
    with pytest.raises(ValueError, match=r"kernels needs one entry per stage \(4\), got 2"):
        ECAResNet(kernels=(3, 5))
    assert set(SIZES) == set(PLAIN) - {"eca_mobilenetv2"}


@pytest.mark.parametrize("hooked", [True, False])
def test_what_a_hook_keeps_of_a_gate_stays_as_it_was(hooked):
    torch.manual_seed(0)
    block, x, kept = ResidualBlock(8, 8).eval(), torch.randn(2, 8, 6, 6), []
    with torch.no_grad():
        gate = block.gate(block.convs(x))
        if hooked:
            block.gate.register_forward_hook(lambda module, inputs, output: kept.append(output))
        y = block(x)
    torch.testing.assert_close(y, (gate + x).relu())
    assert len(kept) == hooked
    for output in kept:
        torch.testing.assert_close(output, gate)
