"""The pyramid skeleton: shapes at any size, layouts that agree, the drop-path schedule, clear errors."""

import pytest
import torch
from torch import nn

from attnlab import cards
from attnlab.models.skeletons.parts import MLP, ChannelNorm, ConvStem, Downsample, DropPath, drop_path_rates
from attnlab.models.skeletons.pyramid import Block, Place, Pyramid, around


def small(**keywords) -> Pyramid:
    torch.manual_seed(0)
    defaults = {"dims": (8, 16), "depths": (1, 2), "strides": (4, 2), "num_classes": 5, "norm": ChannelNorm(16)}
    block = lambda place: Block(place.dim, nn.Conv2d(place.dim, place.dim, 3, padding=1), drop_path=place.drop_path)  # noqa: E731
    return Pyramid(**{**defaults, "block": block, **keywords})


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (37, 45), (8, 8)])
def test_features_have_the_channels_and_reductions_that_the_backbone_states(size):
    net = small()
    maps = net.forward_features(torch.randn(2, 3, *size))
    assert [m.shape[1] for m in maps] == list(net.channels)
    for m, reduction in zip(maps, net.reductions, strict=True):
        sides = [(side // 4 if reduction == 4 else side // 4 // 2) for side in size]  # unpadded strides round down
        assert list(m.shape[-2:]) == sides
    assert net(torch.randn(2, 3, *size)).shape == (2, 5)


def test_maps_stay_in_channels_last_memory_so_no_layout_costs_a_copy():
    for m in small().forward_features(torch.randn(2, 3, 32, 32)):
        assert m.is_contiguous(memory_format=torch.channels_last)


def test_one_mixer_written_for_three_layouts_gives_the_same_block():
    class Maps(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.movedim(1, -1)).movedim(-1, 1)

    class Tokens(Maps):
        def forward(self, x, *, grid):
            assert grid == (5, 7)
            return self.inner(x.unflatten(1, grid)).flatten(1, 2)

    inner = nn.Linear(8, 8)
    x = torch.randn(2, 8, 5, 7)
    outputs = []
    for layout, mixer in (("NHWC", inner), ("NCHW", Maps(inner)), ("tokens", Tokens(inner))):
        torch.manual_seed(1)
        outputs.append(Block(8, mixer, layout=layout, layer_scale=0.5)(x))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_a_block_is_its_equation():
    torch.manual_seed(0)
    conv, local = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
    x = torch.randn(2, 8, 5, 7)
    norm = lambda n, t: n(t.movedim(1, -1)).movedim(-1, 1)  # noqa: E731
    for post in (False, True):
        block = Block(8, conv, mlp=2.0, layer_scale=0.3, post_norm=post, local=local)
        for n in (block.norm1, block.norm2):
            nn.init.normal_(n.weight)
        want = x + local(x)
        want = want + 0.3 * (norm(block.norm1, conv(want)) if post else conv(norm(block.norm1, want)))
        mlp = lambda t: block.mlp(t.movedim(1, -1)).movedim(-1, 1)  # noqa: E731, B023
        want = want + 0.3 * (norm(block.norm2, mlp(want)) if post else mlp(norm(block.norm2, want)))
        torch.testing.assert_close(block(x), want)


def test_drop_path_rises_linearly_over_all_blocks():
    assert drop_path_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == [0.0]
    net = small(drop_path=0.2)
    assert [m.rate for m in net.modules() if isinstance(m, DropPath)] == pytest.approx([0.0, 0.1, 0.2])


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    y = drop(torch.ones(4000, 3))
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (y == y[:, :1]).all()
    assert y.mean().item() == pytest.approx(1.0, abs=0.04)  # 5 standard errors: 5·sqrt(1/3/4000)
    assert torch.equal(drop.eval()(y), y)


def test_blocks_that_shrink_by_themselves_are_told_their_stride_and_width():
    places: list[Place] = []

    def block(place):
        places.append(place)
        return nn.Conv2d(place.input_dim, place.dim, 3, place.stride, 1)

    net = small(block=block, downsample=None)
    assert [(p.stage, p.index, p.input_dim, p.dim, p.stride) for p in places] == [
        (0, 0, 8, 8, 1),
        (1, 0, 8, 16, 2),
        (1, 1, 16, 16, 1),
    ]
    assert [tuple(m.shape[1:]) for m in net.forward_features(torch.randn(1, 3, 32, 32))] == [(8, 8, 8), (16, 4, 4)]


def test_state_dict_names_are_systematic():
    names = {n.rsplit(".", 1)[0] for n in small().state_dict()}
    assert names >= {"stem.conv", "stem.norm", "stages.1.downsample.conv", "stages.1.downsample.norm", "norm", "head"}
    assert {f"stages.1.blocks.1.{part}" for part in ("norm1", "mixer", "norm2", "mlp.fc1", "mlp.fc2")} <= names


@pytest.mark.parametrize(("name", "options"), [("focal", {"levels": 3}), ("eca", {}), ("multihead", {"heads": 2})])
def test_any_registered_mechanism_makes_a_pyramid(name, options):
    net = small(block=around(name, options=options, mlp=2.0, layer_scale=0.1), drop_path=0.2)
    assert net(torch.randn(2, 3, 20, 28)).shape == (2, 5)
    assert type(net.stages[0].blocks[0].mixer) is cards.target(name)
    assert net.stages[1].blocks[1].drop_path.rate == 0.2
    with pytest.raises(ValueError, match="'focalnet' is of kind 'backbone'"):
        around("focalnet")


def test_stems_shrink_by_their_strides():
    x = torch.randn(1, 3, 32, 24)
    assert ConvStem((3, 4, 8), norm=nn.BatchNorm2d, activation=nn.GELU)(x).shape == (1, 8, 8, 6)
    assert Downsample(3, 8, 4, kernel=7, padding=2)(x).shape == (1, 8, 8, 6)
    assert [n for n, _ in ConvStem((3, 4, 8), norm=nn.BatchNorm2d, activation=nn.GELU).named_children()] == [
        "conv1", "norm1", "act1", "conv2", "norm2",
    ]  # fmt: skip


def test_channel_norm_is_layer_norm_over_the_channel_axis():
    x = torch.randn(2, 8, 3, 4, 5)
    torch.testing.assert_close(ChannelNorm(8)(x), nn.functional.layer_norm(x.movedim(1, -1), (8,)).movedim(-1, 1))


def test_without_classes_the_pooled_features_come_out():
    net = small(num_classes=0)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 16)


def test_bad_input_is_named():
    net = small()
    with pytest.raises(ValueError, match=r"x must be images \(B, 3, H, W\), got \(3, 32, 32\)"):
        net(torch.randn(3, 32, 32))
    with pytest.raises(ValueError, match="at least 8 pixels high and wide, got \\(7, 32\\)"):
        net(torch.randn(1, 3, 7, 32))
    with pytest.raises(ValueError, match="one entry per stage, got 3, 2 and 2"):
        small(dims=(8, 16, 32))
    with pytest.raises(ValueError, match="layout must be one of"):
        Block(8, nn.Identity(), layout="HWC")
    with pytest.raises(ValueError, match="rate must be in"):
        DropPath(1.0)


def test_mlp_hidden_width_can_be_given_as_a_module():
    block = Block(8, nn.Identity(), mlp=MLP(8, 12, activation=nn.ReLU))
    assert block.mlp.fc1.weight.shape == (12, 8)
