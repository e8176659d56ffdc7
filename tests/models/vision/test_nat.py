"""NAT and DiNAT: published sizes, the view that dilation opens, any image size, and their stems."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import attnlab
from attnlab.cards import describe
from attnlab.models.vision.nat import AT_224, AT_384, NAT, DiNAT, Merging, Patches
from attnlab.nn.spatial.neighborhood import NeighborhoodAttention


def small(cls=NAT, **keywords):
    torch.manual_seed(0)
    defaults = {"dim": 8, "depths": (2, 2), "heads": 2, "kernel": 3, "num_classes": 5}
    return cls(**{**defaults, **keywords}).eval()


def dilations(net):
    return [[b.mixer.dilation[0] for b in stage.blocks] for stage in net.stages]


def test_dilations_alternate_and_are_as_wide_as_a_224_pixel_image_allows():
    with torch.device("meta"):
        net = attnlab.build("dinat_mini")
    assert dilations(net) == [[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1, 1, 1, 1, 1]]
    # Maps of 56, 28, 14 and 7: the largest dilation with 7·d ≤ side; at 384 pixels 96, 48, 24, 12.
    assert [max(d) for d in AT_224] == [side // 7 for side in (56, 28, 14, 7)]
    assert [max(d) for d in AT_384] == [side // 7 for side in (96, 48, 24, 12)]
    assert all(d == [1] * len(d) for d in dilations(small()))


def test_named_sizes_have_the_heads_and_widths_of_the_papers():
    with torch.device("meta"):
        base, swin = attnlab.build("nat_base", num_classes=10), attnlab.build("dinat_s_tiny")
    assert base.channels == (128, 256, 512, 1024) and base.reductions == (4, 8, 16, 32)
    assert [s.blocks[0].mixer.heads for s in base.stages] == [4, 8, 16, 32]
    assert base.stages[0].blocks[0].scale1 is not None and swin.stages[0].blocks[0].scale1 is None
    assert swin.stages[0].blocks[0].mlp.fc1.out_features == 4 * 96
    assert set(describe("nat").sizes) == {"nat_mini", "nat_tiny", "nat_small", "nat_base"}


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (37, 50), (16, 16)])
@pytest.mark.parametrize("keywords", [{}, {"patches": True, "dilations": ((1, 2), (1, 2))}], ids=["conv", "patches"])
def test_images_of_any_size_give_maps_of_the_stated_widths(keywords, size):
    net = small(**keywords)
    maps = net.forward_features(torch.randn(2, 3, *size))
    rounded = [[-(-side // r) for side in size] for r in (4, 8)]
    assert [list(m.shape) for m in maps] == [[2, 8, *rounded[0]], [2, 16, *rounded[1]]]
    assert net(torch.randn(2, 3, *size)).shape == (2, 5)


def test_without_dilations_dinat_is_nat():
    plain, dilated = small(), small(DiNAT, dilations=None)
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(plain(x), dilated(x))
    assert not torch.equal(plain(x), _same(small(DiNAT, dilations=((1, 2), (1,))), plain)(x))


def _same(net, other):
    net.load_state_dict(other.state_dict())
    return net


def test_alternating_dilation_opens_a_wider_view_than_near_neighbors_at_the_same_cost():
    def view(*steps):
        """Pixels of the input that one output of as many layers depends on: the support of its gradient."""
        torch.manual_seed(0)
        x = torch.randn(1, 27 * 27, 8, dtype=torch.float64, requires_grad=True)
        y = x
        for step in steps:
            y = y + NeighborhoodAttention(8, heads=2, kernel=3, dilation=step).double()(y, grid=(27, 27))
        y[0, 13 * 27 + 13].sum().backward()
        return int((x.grad.abs().sum(-1) > 0).sum())

    # (w − 1)/2 · Σ dilation to each side: 3 → 7 wide; 1 + 3 + 9 → 27 wide.
    assert view(1, 1, 1) == 7 * 7 and view(1, 3, 9) == 27 * 27


def test_merging_puts_the_four_tokens_of_a_block_side_by_side():
    torch.manual_seed(0)
    merging, x = Merging(3, 6), torch.randn(2, 3, 5, 7)
    y = merging(x)
    padded = F.pad(x, (0, 1, 0, 1))
    block = padded[:, :, 2:4, 4:6]
    four = torch.cat([block[:, :, 0, 0], block[:, :, 1, 0], block[:, :, 0, 1], block[:, :, 1, 1]], 1)
    assert y.shape == (2, 6, 3, 4)
    torch.testing.assert_close(y[:, :, 1, 2], merging.reduction(merging.norm(four)))
    with pytest.raises(ValueError, match="stride must be 2, got 4"):
        Merging(3, 6, 4)


def test_patches_pad_an_image_to_whole_ones():
    torch.manual_seed(0)
    patches, x = Patches(3, 8, 4), torch.randn(1, 3, 10, 12)
    torch.testing.assert_close(patches(x), patches(F.pad(x, (0, 0, 0, 2))))


@pytest.mark.parametrize("cls", [NAT, DiNAT])
def test_the_authors_checkpoint_loads_and_gives_their_logits(cls, tmp_path):
    tensors = load_file(Path(__file__).parents[2] / "goldens" / "dinat" / "tiny_model.safetensors")
    theirs = {n.removeprefix("param."): t for n, t in tensors.items() if n.startswith("param.")}
    save_file(theirs, tmp_path / "x.safetensors")
    net = small(cls, heads=(2, 2), mlp_ratio=2, dilations=((1, 3), (1, 2)))
    attnlab.hub.load_official(net, tmp_path / "x.safetensors")
    torch.testing.assert_close(net(tensors["in.x"]), tensors["out.y"])


def test_settings_that_do_not_match_the_stages_are_refused():
    with pytest.raises(ValueError, match=r"heads must hold one entry per stage \(2\), got \[2\]"):
        small(heads=(2,))
    with pytest.raises(ValueError, match=r"dilations must hold one entry per stage \(2\)"):
        small(dilations=((1, 2),))


def test_it_learns():
    torch.manual_seed(0)
    net = small(DiNAT, dilations=((1, 2), (1,))).train()
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    first = None
    for _ in range(25):
        loss = F.cross_entropy(net(x), y)
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first
