"""TiC: any resolution without change, where it looks further, its cost."""

import pytest
import torch

from attnlab.cost import count_flops
from attnlab.models.vision.tic import TiC

TINY = {"dim": 8, "depths": (1, 2), "heads": (2, 4), "kernel": 3, "num_classes": 5}


@pytest.mark.parametrize("size", [(32, 32), (37, 51), (8, 90)])
def test_takes_any_image_size(size: tuple[int, int]) -> None:
    net = TiC(**TINY).eval()
    assert net(torch.randn(2, 3, *size)).shape == (2, 5)
    maps = net.forward_features(torch.randn(1, 3, *size))
    rows, columns = size[0] // 4, size[1] // 4
    assert [m.shape[1:] for m in maps] == [(8, rows, columns), (16, -(-rows // 2), -(-columns // 2))]


def test_every_second_block_looks_further() -> None:
    net = TiC(**{**TINY, "depths": (2, 3)})
    found = [[(b.mixer.shift, b.mixer.inter_pool) for b in stage.blocks] for stage in net.stages]
    near, far = ("none", "none"), ("qkv", "kv_avg")
    assert found == [[near, far], [near, far, near]]


def test_has_no_positions_so_inside_a_larger_image_features_are_the_same() -> None:
    net = TiC(**TINY, shift="none", inter_pool="none").eval().double()
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    whole, part = net.forward_features(x)[0], net.forward_features(x[:, :, 32:64, 32:64])[0]
    torch.testing.assert_close(part[:, :, 1:-1, 1:-1], whole[:, :, 9:15, 9:15])


def test_cost_grows_with_pixels_and_no_faster() -> None:
    net = TiC(**TINY).eval()
    with torch.no_grad():
        small, large = (count_flops(net, torch.randn(1, 3, side, side)) for side in (128, 256))
    assert large / small == pytest.approx(4.0, rel=0.05)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="heads needs one entry"):
        TiC(heads=(3,))
    with pytest.raises(ValueError, match="at least 8 pixels"):
        TiC(**TINY)(torch.randn(1, 3, 4, 32))
