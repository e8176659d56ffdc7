"""SpectFormer: one path around a spectral block, the class token of the mean, token labelling, sizes of images."""

import pytest
import torch

from attnlab.models.vision.spectformer import SIZES, SpectFormer, SpectralBlock, VanillaSpectFormer
from attnlab.nn.multihead import MultiHead
from attnlab.nn.spatial.spectral_gating import SpectralGating
from attnlab.recipes.token_labelling import swap_box

TINY = {"dims": (16, 16, 16, 24), "depths": (1, 1, 1, 1), "heads": (2, 2, 2, 2), "mlp_ratios": (2, 2, 2, 2),
        "stem": 8, "image": 64, "num_classes": 5}  # fmt: skip


def test_a_spectral_block_has_one_path_around_it():
    block, x = SpectralBlock(6, SpectralGating(6, spectrum=(3, 3))), torch.randn(2, 12, 6)
    y = x + block.mlp(block.norm2(block.mixer(block.norm1(x), grid=(3, 4))))
    torch.testing.assert_close(block(x, grid=(3, 4)), y)


def test_the_first_layers_filter_and_the_later_attend():
    net = VanillaSpectFormer(dim=12, depth=5, heads=2, spectral=3, image=16, patch=4, num_classes=5)
    assert [type(b.mixer) for b in net.encoder.blocks] == [SpectralGating] * 3 + [MultiHead] * 2
    kinds = [type(stage.blocks[0].mixer) for stage in SpectFormer(**TINY, spectral=1).stages]
    assert kinds == [SpectralGating] + [MultiHead] * 3


def test_the_class_token_begins_as_the_mean_and_dense_logits_join_it():
    net, x = SpectFormer(**TINY).eval(), torch.randn(2, 3, 64, 64)
    places = net.forward_features(x)[-1].flatten(2).mT
    summary = net.norm(net.class_block(places.mean(1, keepdim=True), places))[:, 0]
    logits = net.head(summary) + 0.5 * net.dense_head(net.norm(places)).amax(1)
    torch.testing.assert_close(net(x), logits)


def test_without_the_dense_head_there_are_class_logits_alone():
    net = SpectFormer(**TINY, dense=False)
    assert net.dense_head is None and not net.mix_token
    assert net.train()(torch.randn(4, 3, 64, 64)).shape == (4, 5)
    with torch.device("meta"):
        count = sum(p.numel() for p in SpectFormer(**SIZES["spectformer_s"].arguments, dense=False).parameters())
    assert count == 21_777_928


def test_training_mixes_maps_and_gives_back_the_place_logits_unmixed():
    net = SpectFormer(**TINY).train()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # so that two calls see the same
    x = torch.randn(2, 3, 128, 128)
    logits, dense, (top, left, bottom, right) = net(x, generator=torch.Generator().manual_seed(0))
    assert logits.shape == (2, 5) and dense.shape == (2, 16, 5)
    assert 0 < (bottom - top) * (right - left) < 16
    maps = net.embed(x).permute(0, 2, 3, 1)
    maps = swap_box(maps, (8 * top, 8 * left, 8 * bottom, 8 * right)).permute(0, 3, 1, 2)
    for stage in net.stages:
        maps = stage(maps)
    mixed = net.dense_head(net.norm(maps.permute(0, 2, 3, 1)))
    torch.testing.assert_close(dense, swap_box(mixed, (top, left, bottom, right)).flatten(1, 2))


@pytest.mark.parametrize("size", [(64, 64), (70, 101)])
def test_takes_any_image_size(size):
    assert SpectFormer(**TINY).eval()(torch.randn(1, 3, *size)).shape == (1, 5)


def test_the_plain_network_takes_multiples_of_its_patch():
    net = VanillaSpectFormer(dim=12, depth=2, heads=2, spectral=1, image=16, patch=4, num_classes=5).eval()
    assert net(torch.randn(1, 3, 24, 12)).shape == (1, 5)
    with pytest.raises(ValueError, match="multiples of patch=4"):
        net(torch.randn(1, 3, 18, 16))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"spectral must be in \[0, depth = 2\], got 3"):
        VanillaSpectFormer(dim=12, depth=2, spectral=3)
    with pytest.raises(ValueError, match="dims, heads and mlp_ratios need one entry per stage, got 4, 2 and 4"):
        SpectFormer(heads=(2, 4))
