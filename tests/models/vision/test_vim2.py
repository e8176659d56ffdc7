"""ViM2: what it is at the start, its fixed image size, and its variant with MLPs."""

import pytest
import torch
from torch import nn

from attnlab.models.vision.vim2 import ViM2

TINY = {"dims": (8, 8, 12, 16), "depths": (1, 1, 2, 1), "states": 2, "image": 64, "num_classes": 5}


@torch.no_grad()
def test_without_channel_mixers_it_starts_as_a_plain_stack_of_cross_scans():
    net, x = ViM2(**TINY).eval(), torch.randn(1, 3, 64, 64)
    y = net.stem(x)
    for stage in net.stages:
        y = y if stage.downsample is None else stage.downsample(y)
        stack = stage.blocks[0].stack
        for i, mixing in enumerate(stack.token_mixers):
            stack.channel_mixers[i] = nn.Identity()
            for norm, mixer in zip(mixing.norms, mixing.mixers, strict=True):
                tokens = y.flatten(2).mT
                y = y + mixer(norm(tokens), grid=y.shape[2:]).mT.reshape(y.shape)
    torch.testing.assert_close(net.forward_features(x)[-1], y, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_layer_has_two_token_mixers_and_one_that_scans_the_channels():
    stack = ViM2(**TINY).eval().stages[2].blocks[0].stack
    assert [len(m.mixers) for m in stack.token_mixers] == [2, 2] and len(stack.channel_mixers) == 2
    mixing, x = stack.channel_mixers[0], torch.randn(1, 16, 12)
    other = x.clone()
    other[..., 0] += 1  # one channel changes: every other one hears of it, through the scan and not through the norm
    mixing.norm = nn.Identity()
    assert ((mixing(x) != mixing(other)).any(1)).all()


@torch.no_grad()
def test_with_mlps_it_takes_any_size():
    net = ViM2(**TINY, channels="mlp").eval()
    assert [m.shape[2:] for m in net.forward_features(torch.randn(1, 3, 40, 72))] == [(10, 18), (5, 9), (2, 4), (1, 2)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ViM2(**TINY)(torch.zeros(1, 3, 32, 64)), r"x must be images of \(64, 64\)"),
        (lambda: ViM2(**{**TINY, "image": 50}), "image must be a multiple of 32"),
        (lambda: ViM2(**TINY, channels="none"), "channels must be"),
        (lambda: ViM2(**TINY, averaging="mean"), "averaging must be one of"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
