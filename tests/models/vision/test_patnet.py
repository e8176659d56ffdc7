"""PATNet: the authors' sizes, timm's FasterNet as a peer, what partial convolution saves, gates, distances, folding."""

import copy
import math

import pytest
import torch
from torch import nn

import attnlab
from attnlab.cost import count_flops
from attnlab.hub.official.patnet import FasterNet, PartialNet
from attnlab.models.vision.patnet import SIZES, PATNet
from attnlab.nn.channel.style import StyleRecalibration
from attnlab.nn.spatial.partial import PartialChannel, PartialConv, PartialSelf, PartialSpatial
from attnlab.positions.distance import DistanceBias, distance_buckets

# Millions of parameters, measured on the authors' code, without and with attention over places.
MILLIONS = {
    "t0": (3.486, 3.558), "t1": (None, 6.145), "t2": (12.270, 12.651), "s": (28.014, 28.976), "m": (59.180, 61.367),
    "l": (100.642, 104.466),
}  # fmt: skip
TINY = {"embed_dim": 8, "depths": (1, 1, 1, 1), "feature_dim": 16, "num_classes": 5}


def shaken(net: nn.Module) -> nn.Module:
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if "running_var" in name else nn.init.normal_(tensor, std=0.3)
    return net.eval()


def test_has_the_sizes_of_the_authors_code():
    for name, counts in MILLIONS.items():
        for suffix, millions in zip(("", "_sp"), counts, strict=True):
            if millions is not None:
                assert round(SIZES[f"patnet_{name}{suffix}"].params / 1e6, 3) == millions


@pytest.mark.parametrize("options", [{}, {"layer_scale_init_value": 0.5, "n_div": 2}], ids=["plain", "scaled"])
@pytest.mark.parametrize("size", [(32, 32), (70, 45)])
def test_without_attention_it_equals_timms_fasternet(timm, size, options):
    from timm.models.fasternet import FasterNet as Peer

    peer = shaken(Peer(**TINY, **options))
    net = FasterNet.build({**TINY, **options}, peer.state_dict())
    x = torch.randn(2, 3, *size, requires_grad=True)
    ours, theirs = net(x), peer(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    ours, theirs = (torch.autograd.grad(y.pow(2).sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5 * theirs.abs().max().item())


def test_partial_convolution_leaves_the_other_channels_and_saves_most_of_the_work():
    mixer, x = PartialConv(16, parts=4), torch.randn(1, 16, 8, 8)
    assert torch.equal(mixer(x)[:, 4:], x[:, 4:])
    whole = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    with torch.no_grad():
        assert 16 * count_flops(mixer, x) == count_flops(whole, x)


def test_style_is_a_gate_of_means_and_unbiased_deviations():
    module = shaken(StyleRecalibration(6)).double()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    mean, std = x.mean((2, 3)), x.std((2, 3))
    score = mean @ module.fc.weight[:, :6].T + std @ module.fc.weight[:, 6:].T
    score = (score - module.norm.running_mean) / (module.norm.running_var + 1e-5).sqrt()
    gate = ((score * module.norm.weight + module.norm.bias + 3) / 6).clamp(0, 1)
    torch.testing.assert_close(module(x), x * gate[:, :, None, None])
    assert 0 <= module.gate(100 * x).min() and module.gate(100 * x).max() <= 1


def test_a_single_place_has_no_spread():
    x = torch.randn(3, 8, 1, 1, requires_grad=True)
    y = PartialChannel(8)(x)
    assert y.isfinite().all() and torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_the_bias_depends_on_the_distance_alone():
    bias = DistanceBias(2)
    nn.init.normal_(bias.table)
    lookup, places = bias.on((5, 30)), torch.arange(150)
    table = torch.stack([lookup(places, torch.tensor(h), places[:, None], places) for h in range(2)])
    assert torch.equal(table, table.mT)
    at = lambda row, column: 30 * row + column  # noqa: E731
    assert torch.equal(table[:, at(0, 0), at(3, 4)], bias.table[45])  # a distance of 5 in either direction
    assert torch.equal(table[:, at(4, 1), at(0, 4)], bias.table[45])
    far = round(20 + math.log(29 / 20) / math.log(8) * 20)
    assert torch.equal(table[:, at(0, 0), at(0, 29)], bias.table[40 + far])
    assert distance_buckets(torch.tensor([0.0, 20.0, 160.0, 900.0])).tolist() == [0, 20, 40, 40]


def test_self_attention_equals_its_formula():
    module = shaken(PartialSelf(16, heads=2)).double()
    x = torch.randn(2, 16, 3, 4, dtype=torch.float64)
    tokens = module.norm(x[:, 4:].permute(0, 2, 3, 1)).reshape(2, 12, 12)
    q, k, v = (t.reshape(2, 12, 2, 6).transpose(1, 2) for t in module.wqkv(tokens).split(12, -1))
    scores = q @ k.mT / 6**0.5
    for i in range(12):
        for j in range(12):
            distance = math.hypot(i // 4 - j // 4, i % 4 - j % 4)
            scores[:, :, i, j] += module.bias.table[40 + round(distance)]
    y = module.wo((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 12, 12)).reshape(2, 3, 4, 12)
    torch.testing.assert_close(module(x), torch.cat((module.conv(x[:, :4]), y.permute(0, 3, 1, 2)), 1))


def test_it_drops_in_training_alone():
    module, x = PartialSelf(16, heads=2), torch.randn(1, 16, 4, 4)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_folded_it_is_the_same_network():
    net = shaken(PATNet(dim=8, depths=(1, 1, 1, 1), head_dim=16, spatial=True, num_classes=5)).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    folded = copy.deepcopy(net).fuse()
    assert (
        sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == 3 + 4
    )  # behind gates: three PAT_ch, four PAT_sp
    torch.testing.assert_close(folded(x), net(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(folded.fuse()(x), net(x), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"fuse needs eval\(\)"):
        PartialSpatial(8).fuse()


def test_the_authors_checkpoints_load_by_their_names():
    net = attnlab.build("patnet_t0", num_classes=10)
    state = net.state_dict()
    block = "stages.3.blocks.1.mixer."
    theirs = {"stages.6.blocks.1.spatial_mixing.attn.rpe_k.lookup_table_bias": state[block + "bias.table"].mT}
    theirs["stages.5.reduction.weight"] = state["stages.3.downsample.conv.weight"]
    theirs["stages.0.blocks.0.spatial_mixing.attn.cfc1.weight"] = torch.zeros(24, 24, 1, 2)
    renamed = PartialNet.rename(theirs)
    assert {n: t.shape for n, t in renamed.items()} == {n: state[n].shape for n in renamed}


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="heads must divide the 12 channels that attend, got 5"):
        PartialSelf(16, heads=5)
    with pytest.raises(ValueError, match=r"parts must be in \[1, dim = 4\], got 8"):
        PartialConv(4, parts=8)
    with pytest.raises(ValueError, match=r"activation must be one of \('relu', 'gelu'\), got 'silu'"):
        PATNet(dim=8, depths=(1,), activation="silu")
    with pytest.raises(ValueError, match="dim must be even, got 7"):
        PartialSpatial(7)
    with pytest.raises(ValueError, match="exact must lie below last and limit"):
        DistanceBias(2, exact=50)
