"""HaloNet: the sizes of the paper's table, timm's networks with the same weights, where it attends, and its errors."""

import pytest
import torch
from torch import nn

import attnlab
from attnlab.hub.official.halonet import HaloAttn, Network
from attnlab.models.vision.halonet import SIZES, HaloNet
from attnlab.nn.spatial.halo import HaloAttention

# Millions of parameters in the paper's table of HaloNets, arXiv 2103.12731.
MILLIONS = {"h0": 5.5, "h1": 8.1, "h2": 9.4, "h3": 12.3, "h4": 19.1, "h5": 30.7, "h6": 43.4, "h7": 67.4}


def test_sizes_are_those_of_the_papers_table() -> None:
    for name, millions in MILLIONS.items():
        assert SIZES[f"halonet_{name}"].params / 1e6 == pytest.approx(millions, abs=0.06)


def spread(net: nn.Module) -> None:
    """Weights that let every branch through: as built, the last norm of each begins at zero."""
    for p in net.parameters():
        if p.ndim < 2:
            nn.init.normal_(p, std=0.1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.add_(1.0)


@pytest.mark.parametrize("name", ["halonet26t", "sehalonet33ts", "haloregnetz_b"])
def test_equals_timms_network(timm, name: str) -> None:
    peer = timm.create_model(name, num_classes=7).eval()
    spread(peer)
    net = Network.build({"case_name": name, "num_classes": 7}, peer.state_dict()).eval()
    side = 224 if name == "haloregnetz_b" else 256
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(net(x), peer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "keywords", [{"scale_pos_embed": True}, {"stride": 2, "avg_down": True}], ids=["scaled", "mean"]
)
def test_equals_timms_layer_with_its_other_options(timm, keywords: dict) -> None:
    from timm.layers.halo_attn import HaloAttn as Peer

    arguments = {"dim": 16, "num_heads": 2, "block_size": 4, "halo_size": 2, "qk_ratio": 0.5, **keywords}
    peer = Peer(**arguments).double()
    ours = HaloAttn.build(arguments, peer.state_dict()).double()
    x = torch.randn(2, 16, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), peer(x))


def test_attention_stands_where_it_is_asked_for() -> None:
    with torch.device("meta"):
        net = attnlab.build("haloregnetz_b")
    words = ["".join("a" if isinstance(b.mix, nn.Sequential) and isinstance(b.mix[0], HaloAttention) else "c"
                     for b in stage.blocks) for stage in net.stages]  # fmt: skip
    assert words == ["cc", "cccccc", "cccacccaccca", "aa"]


def test_any_whole_number_of_blocks_is_an_image_and_others_are_refused() -> None:
    net = HaloNet(dims=(8, 16), depths=(1, 1), heads=2, block=2, halo=1, stem_dim=8, num_classes=3).eval()
    assert [tuple(m.shape) for m in net.forward_features(torch.randn(1, 3, 32, 48))] == [(1, 8, 8, 12), (1, 16, 4, 6)]
    with pytest.raises(ValueError, match="multiples of block=2"):
        net(torch.randn(1, 3, 36, 48))
    with pytest.raises(ValueError, match="attends needs a word"):
        HaloNet(dims=(8,), depths=(2,), attends=("a",))
    with pytest.raises(ValueError, match="heads and ratio"):
        HaloNet(dims=(8,), depths=(1,), heads=(2, 2))
    with pytest.raises(ValueError, match="stem must be"):
        HaloNet(dims=(8,), depths=(1,), heads=2, stem="small")
