"""HorFPN: the neck written out, its further levels, any sizes, and behind a backbone."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import attnlab
from attnlab.cost import count_flops
from attnlab.hub.official.hornet import GNFPN
from attnlab.models.vision.horfpn import HorFPN


def official_params(maps, dim, extra=0, order=2, source=None):
    """Random parameters under the authors' names."""
    params = {}

    def conv(name, out, into, kernel=1):
        params[f"{name}.weight"] = torch.randn(out, into, kernel, kernel) / (into * kernel) ** 0.5
        params[f"{name}.bias"] = torch.randn(out) / 4

    def gated(name):
        widths = [dim // 2**i for i in reversed(range(order))]
        conv(f"{name}.proj_in", 2 * dim, dim)
        conv(f"{name}.proj_out", dim, dim)
        conv(f"{name}.dwconv", sum(widths), 1, 7)
        for i, (a, b) in enumerate(pairwise(widths)):
            conv(f"{name}.pws.{i}", b, a)

    for i, width in enumerate(maps):
        conv(f"lateral_convs.{i}.conv", dim, width)
        gated(f"fpn_convs.{i}")
    for i in range(extra):
        conv(f"fpn_convs.{len(maps) + i}.0.conv", dim, maps[-1] if source == "on_input" and not i else dim, 3)
        gated(f"fpn_convs.{len(maps) + i}.1")
    return params


def written_out(params, maps, dim, levels, source):
    """The authors' forward, with plain convolutions."""

    def conv(name, x, **how):
        return F.conv2d(x, params[f"{name}.weight"].double(), params[f"{name}.bias"].double(), **how)

    def gated(name, x):
        p, q = conv(f"{name}.proj_in", x).split((dim // 2, dim // 2 + dim), 1)
        q0, q1 = conv(f"{name}.dwconv", q, padding=3, groups=dim // 2 + dim).split((dim // 2, dim), 1)
        return conv(f"{name}.proj_out", conv(f"{name}.pws.0", p * q0) * q1)

    lateral = [conv(f"lateral_convs.{i}.conv", x) for i, x in enumerate(maps)]
    for i in range(len(maps) - 1, 0, -1):
        lateral[i - 1] = lateral[i - 1] + F.interpolate(lateral[i], lateral[i - 1].shape[2:], mode="nearest")
    outs = [gated(f"fpn_convs.{i}", x) for i, x in enumerate(lateral)]
    x = {"on_input": maps[-1], "on_lateral": lateral[-1], "on_output": outs[-1]}.get(source)
    for i in range(len(maps), levels):
        if source is None:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        else:
            x = gated(f"fpn_convs.{i}.1", conv(f"fpn_convs.{i}.0.conv", x, stride=2, padding=1))
            outs.append(x)
    return outs


@pytest.mark.parametrize("source", [None, "on_input", "on_lateral", "on_output"])
def test_equals_the_neck_written_out_under_the_authors_names(source):
    widths, dim = (6, 10, 12), 8
    maps = [torch.randn(2, c, *s, dtype=torch.float64) for c, s in zip(widths, ((13, 16), (7, 8), (4, 4)), strict=True)]
    params = official_params(widths, dim, 2 if source else 0, source=source)
    arguments = {"in_channels": list(widths), "out_channels": dim, "num_outs": 5, "add_extra_convs": source or False}
    found = GNFPN.run(GNFPN.build(arguments, params).double(), {f"x{i}": x for i, x in enumerate(maps)})
    for i, wanted in enumerate(written_out(params, maps, dim, 5, source)):
        torch.testing.assert_close(found[f"y{i}"], wanted)


def test_a_backbone_and_its_neck_learn_together_at_any_size():
    body = attnlab.build(
        "hornet_tiny_7x7", features_only=True, dim=8, depths=(1, 1, 1, 1), orders=(1, 2, 3, 4)
    )  # fmt: skip
    neck = HorFPN(body.channels, 16, levels=5, spectrum=(4, 3))
    found = neck(body(torch.randn(1, 3, 64, 96)))
    assert [tuple(y.shape) for y in found] == [(1, 16, 64 // r, 96 // r) for r in (4, 8, 16, 32)] + [(1, 16, 1, 2)]
    sum(y.square().mean() for y in found).backward()
    assert all(p.grad is not None and p.grad.any() for p in neck.mix.parameters())


def test_every_output_knows_the_coarser_maps_and_none_of_the_finer():
    neck = HorFPN((4, 4, 4), 8).double()
    maps = [torch.randn(1, 4, s, s, dtype=torch.float64) for s in (16, 8, 4)]
    first = neck(maps)
    maps[1] = maps[1] + 1
    assert [torch.equal(a, b) for a, b in zip(first, neck(maps), strict=True)] == [False, False, True]


def test_a_gated_convolution_costs_less_than_the_convolution_that_it_replaces():
    with torch.device("meta"):
        maps = [torch.randn(1, 256, 32, 32)]
        neck, lateral = HorFPN((256,), 256), torch.nn.Conv2d(256, 256, 1)
        ours = count_flops(neck, maps) - count_flops(lateral, maps[0])
        assert ours < 0.6 * count_flops(torch.nn.Conv2d(256, 256, 3, padding=1), maps[0])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="levels must be at least the 2 maps"):
        HorFPN((4, 8), levels=1)
    with pytest.raises(ValueError, match="extra must be None or one of input, lateral, output, got 'pool'"):
        HorFPN((4, 8), extra="pool")
    with pytest.raises(ValueError, match=r"maps must be 2 \(B, C, H, W\) with C of \(4, 8\)"):
        HorFPN((4, 8), 16)([torch.randn(1, 4, 8, 8)])
