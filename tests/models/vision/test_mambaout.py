"""MambaOut: the paper's cost, timm's network as a peer, the limits of its mixer, and what counts as a long sequence."""

import pytest
import torch
from torch import nn

import attnlab
from attnlab.cost import count_flops
from attnlab.hub.official.mambaout import GatedCNNBlock
from attnlab.hub.official.mambaout import MambaOut as Official
from attnlab.lens.long_sequence import long_sequence
from attnlab.models.skeletons.plain import TokenBlock
from attnlab.models.vision.mambaout import SIZES, GatedBlock, MambaOut
from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.gated_cnn import GatedCNN

# Multiply-adds at 224×224 (table 1) and parameters in millions.
PUBLISHED = {
    "mambaout_femto": (1.2, 7.3),
    "mambaout_kobe": (1.5, 9.1),
    "mambaout_tiny": (4.5, 26.5),
    "mambaout_small": (9.0, 48.5),
    "mambaout_base": (15.8, 84.8),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_costs_what_the_paper_says(name):
    gigas, millions = PUBLISHED[name]
    with torch.device("meta"), torch.no_grad():
        flops = count_flops(attnlab.build(name), torch.randn(1, 3, 224, 224))
    assert flops / 2e9 == pytest.approx(gigas, rel=0.01, abs=0.06)  # norms are not counted
    assert SIZES[name].params / 1e6 == pytest.approx(millions, abs=0.05)


TINY = {"dims": (8, 12, 16, 20), "depths": (1, 1, 2, 1), "num_classes": 5}


@pytest.mark.parametrize("options", [{}, {"conv_ratio": 0.5, "expansion_ratio": 2, "kernel_size": 5}], ids=["1", "½"])
@pytest.mark.parametrize("size", [(32, 32), (45, 70)])
def test_equals_timms_network(timm, size, options):
    from timm.models.mambaout import MambaOut as Peer

    peer = Peer(**TINY, **options).eval()
    for p in peer.parameters():
        nn.init.normal_(p, std=0.3)
    net = Official.build({**TINY, **options}, peer.state_dict())
    x = torch.randn(2, 3, *size, requires_grad=True)
    torch.testing.assert_close(net(x), peer(x), rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(m(x).pow(2).sum(), x)[0] for m in (net, peer))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_loads_timms_sizes(timm):
    with torch.device("meta"):
        for name in SIZES:
            peer, net = timm.create_model(name), attnlab.build(name)
            theirs = {n: t.shape for n, t in Official.rename(peer.state_dict()).items()}
            assert theirs == {n: t.shape for n, t in net.state_dict().items()}


def test_one_block_equals_timms(timm):
    from timm.models.mambaout import GatedConvBlock

    peer = GatedConvBlock(12).eval()
    block = GatedCNNBlock.build({"dim": 12}, peer.state_dict())
    x = torch.randn(2, 5, 6, 12)
    torch.testing.assert_close(GatedCNNBlock.run(block, {"x": x})["y"], peer(x))


def test_the_convolved_channels_are_the_last_and_relative_to_the_width():
    mixer = GatedCNN(16, conv_ratio=0.5)
    assert (mixer.hidden, mixer.convolved) == (42, 8)  # ⌊8/3 · 16⌋, ⌊16/2⌋
    x = torch.randn(1, 16, 3, 3, dtype=torch.float64)
    mixer = mixer.double()
    nn.init.dirac_(mixer.conv.weight, groups=8)
    mixer.conv.weight.data.mul_(2)  # the convolution doubles its channels
    nn.init.zeros_(mixer.conv.bias)
    gate, value = mixer.fc1(x.movedim(1, -1)).chunk(2, -1)
    doubled = torch.cat((value[..., :34], 2 * value[..., 34:]), -1)
    torch.testing.assert_close(mixer(x).movedim(1, -1), mixer.fc2(nn.functional.gelu(gate) * doubled))


@pytest.mark.parametrize("conv_ratio", [0.0, 0.5, 1.0])
def test_without_gradients_it_is_the_same(conv_ratio):
    mixer, x = GatedCNN(8, conv_ratio=conv_ratio), torch.randn(2, 8, 5, 4)
    kept = x.clone()
    with torch.no_grad():
        y = mixer(x)
    torch.testing.assert_close(y, mixer(x))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("conv_ratio", [1.0, 0.4, 8 / 3])
def test_with_many_places_it_is_the_same(conv_ratio):
    mixer, x = GatedCNN(8, conv_ratio=conv_ratio).double(), torch.randn(2, 8, 9, 10, dtype=torch.float64)
    inputs, outputs = list(mixer.parameters()), []
    for watched in (False, True):
        if watched:  # then fc1 is called as it is
            mixer.fc1.register_forward_hook(lambda *_: None)
        outputs.append(mixer(x))
        outputs.extend(torch.autograd.grad(outputs[-1].pow(3).sum(), inputs))
        with torch.no_grad():
            outputs.append(mixer(x))
    half = len(outputs) // 2
    torch.testing.assert_close(outputs[:half], outputs[half:])


def test_without_convolved_channels_places_do_not_mix():
    mixer = GatedCNN(8, conv_ratio=0.0)
    x = torch.randn(1, 8, 4, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x)[0, :, 1, 2].sum(), x)
    assert gradient[0, :, 1, 2].any()
    gradient[0, :, 1, 2] = 0
    assert not gradient.any()


def test_a_block_whose_last_layer_is_zero_is_the_identity():
    block = GatedBlock(8, GatedCNN(8))
    nn.init.zeros_(block.mixer.fc2.weight)
    nn.init.zeros_(block.mixer.fc2.bias)
    x = torch.randn(2, 8, 5, 4)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize(("tokens", "dim", "threshold", "long"), [(196, 384, 2304, False), (4000, 384, 2304, True)])
def test_length_is_judged_by_what_a_block_computes(tokens, dim, threshold, long):
    found = long_sequence(tokens, dim)
    assert (found.threshold, found.long) == (threshold, long)
    with torch.device("meta"), torch.no_grad():  # a transformer block's two kinds of work, counted
        block = TokenBlock(dim, MultiHead(dim, heads=6))
        flops = count_flops(block, torch.randn(1, tokens, dim))
    linear = 24 * dim**2 * tokens
    assert (flops - linear) / linear == pytest.approx(found.ratio, rel=1e-3)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="kernel must be odd, to keep the map's size, got 4"):
        GatedCNN(8, kernel=4)
    with pytest.raises(ValueError, match="conv_ratio must lie between 0 and expansion = 2, got 3"):
        GatedCNN(8, expansion=2, conv_ratio=3)
    with pytest.raises(ValueError, match="dims must begin with at least 2"):
        MambaOut(dims=(1, 2), depths=(1, 1))
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        long_sequence(0, 384)
