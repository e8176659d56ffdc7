"""CrossFormer: the paper's cost, embeddings of several scales, cooling layers, any image, and pairing far apart."""

import pytest
import torch
from torch import nn

import attnlab
from attnlab.cost import count_flops
from attnlab.hub.official.crossformer import CrossFormer as Official
from attnlab.models.vision.crossformer import CrossFormer, CrossScale, CrossScaleBlock
from attnlab.nn.spatial.cross_scale import LongShortDistance


def test_costs_what_the_paper_says():
    with torch.device("meta"), torch.no_grad():
        flops = count_flops(attnlab.build("crossformer_tiny").eval(), torch.randn(1, 3, 224, 224))
    assert flops / 2e9 == pytest.approx(2.9, abs=0.1)  # arXiv 2108.00154 table 2


def test_embeddings_of_all_scales_are_centred_on_the_same_patch():
    stem = CrossScale(1, 16, 4, kernels=(4, 8, 16, 32))
    assert [conv.out_channels for conv in stem.convs] == [8, 4, 2, 2]
    x = torch.randn(1, 1, 64, 64, requires_grad=True)
    y = stem(x)
    assert y.shape == (1, 16, 16, 16)
    for channel, kernel in ((0, 4), (8, 8), (12, 16), (14, 32)):
        seen = torch.autograd.grad(y[0, channel, 8, 8], x, retain_graph=True)[0][0, 0] != 0
        start = 8 * 4 - (kernel - 4) // 2
        wanted = torch.zeros(64, 64, dtype=torch.bool)
        wanted[start : start + kernel, start : start + kernel] = True
        assert torch.equal(seen, wanted)


def test_merging_norms_before_it_convolves():
    merge, x = CrossScale(8, 16, 2, kernels=(2, 4), before=True), torch.randn(2, 8, 6, 4)
    normed = nn.functional.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2)
    wanted = torch.cat([merge.convs[0](normed), merge.convs[1](normed)], 1)
    torch.testing.assert_close(merge(x), wanted)


def test_plus_plus_cools_every_third_block_but_a_stages_last():
    with torch.device("meta"):
        net = attnlab.build("crossformerpp_huge")
    cooled = [[i for i, block in enumerate(stage.blocks) if block.cooling is not None] for stage in net.stages]
    assert cooled == [[2], [2], [2, 5, 8, 11, 14], []]
    assert [[block.mixer.interval for block in stage.blocks[:2]] for stage in net.stages] == [[1, 4], [1, 2]] + 2 * [
        [1, 1]
    ]


def test_cooling_has_no_shortcut():
    block = CrossScaleBlock(16, LongShortDistance(16, heads=2, window=2), cooling=True)
    with torch.no_grad():
        block.cooling[0].weight.zero_()
    y = block(torch.randn(1, 16, 4, 4))
    torch.testing.assert_close(y, y[..., :1, :1].expand_as(y))


@pytest.mark.parametrize("size", [(32, 32), (37, 51), (16, 90)])
def test_takes_any_image_size(size):
    net = CrossFormer(dim=16, depths=(2, 1), heads=(2, 2), windows=(3, 3), intervals=(2, 1), num_classes=5).eval()
    x = torch.randn(2, 3, *size)
    assert net(x).shape == (2, 5)
    torch.testing.assert_close(net(x)[1:], net(x[1:]), rtol=1e-4, atol=1e-5)


def pairs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two marks, far apart: are they of one colour?"""
    x, signs = torch.randn(batch, 3, 8, 8) * 0.3, torch.randint(2, (2, batch)) * 2.0 - 1
    x[:, 0, 2:4, 2:4] += 2 * signs[0, :, None, None]
    x[:, 0, 6:8, 6:8] += 2 * signs[1, :, None, None]
    return x, (signs[0] == signs[1]).long()


@pytest.mark.parametrize("interval", [1, 4], ids=["short-alone", "short-and-long"])
def test_far_apart_is_paired_by_long_distance_attention_and_not_by_short(interval):
    blocks = [
        CrossScaleBlock(16, LongShortDistance(16, heads=2, window=2, interval=i, position_dim=8), mlp=2.0)
        for i in (1, interval)
    ]
    body, head = nn.Sequential(nn.Conv2d(3, 16, 1), *blocks), nn.Linear(16, 2)
    optimiser = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=1e-2)

    def answer(x):
        return head(body(x)[:, :, 7, 7])  # read where the second mark is

    for _ in range(60):
        x, y = pairs(64)
        optimiser.zero_grad()
        nn.functional.cross_entropy(answer(x), y).backward()
        optimiser.step()
    x, y = pairs(512)
    with torch.no_grad():
        accuracy = (answer(x).argmax(-1) == y).float().mean().item()
    assert accuracy > 0.9 if interval > 1 else accuracy < 0.6


def test_unpublished_variants_are_refused_by_name():
    with pytest.raises(ValueError, match="use_cpe must be as in the published models"):
        Official.build({"use_cpe": True}, {})


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"windows must have one entry per stage \(4\), got 2"):
        CrossFormer(windows=(7, 7))
    with pytest.raises(ValueError, match=r"kernels must be stride = 4 or larger by an even number, got \(4, 7\)"):
        CrossScale(3, 16, 4, kernels=(4, 7))
