"""Super Token ViT: the paper's cost, any image size, the fused network, and the authors' names."""

import pytest
import torch
from torch import nn

import attnlab
from attnlab.cost import count_flops
from attnlab.hub.official.stvit import STViT as Official
from attnlab.models.vision.stvit import STViT

TINY = {"dims": (8, 16), "depths": (1, 1), "heads": (2, 2), "cells": (2, 1), "head_dim": 16, "num_classes": 5}


def shaken(net: nn.Module) -> nn.Module:
    for name, p in [*net.named_parameters(), *net.named_buffers()]:
        if p.is_floating_point():
            nn.init.uniform_(p, 0.5, 1.5) if "running_var" in name else nn.init.normal_(p, 0.0, 0.3)
    return net.eval()


# GFLOPs (multiply-adds) at 224×224, as the authors give them.
@pytest.mark.parametrize(("name", "published"), [("stvit_small", 4.4), ("stvit_base", 9.9)])
def test_costs_what_the_paper_says(name, published):
    with torch.device("meta"), torch.no_grad():
        flops = count_flops(attnlab.build(name).eval(), torch.randn(1, 3, 224, 224))
    assert flops / 2e9 == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (8, 40)])
def test_takes_any_image_size(size):
    net = shaken(STViT(**TINY))
    x = torch.randn(2, 3, *size)
    assert net(x).shape == (2, 5)
    torch.testing.assert_close(net(x)[1:], net(x[1:]), rtol=1e-4, atol=1e-5)


def test_a_fused_network_gives_the_same():
    net = shaken(STViT(**TINY, layer_scale=(None, 0.1)).double())
    x = torch.randn(2, 3, 24, 40, dtype=torch.float64)
    before = net(x)
    torch.testing.assert_close(net.fuse().fuse()(x), before)
    left = [name for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert left == ["stem.norm1", "stem.norm2", "stem.norm3", "stem.norm4"]


def test_heads_that_weights_do_not_tell_are_asked_for():
    params = {"layers.0.blocks.0.norm2.bias": torch.zeros(8), "layers.1.blocks.0.norm2.bias": torch.zeros(8)}
    with pytest.raises(ValueError, match=r"heads must be given for stages of widths \(8, 8\)"):
        Official.rename(params)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="cells needs one entry per stage, 2, got 1"):
        STViT(**{**TINY, "cells": (2,)})
    with pytest.raises(ValueError, match="at least 8 pixels high and wide"):
        STViT(**TINY)(torch.randn(1, 3, 4, 16))
