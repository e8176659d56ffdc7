"""BiFormer: the authors' sizes and cost, its stages, any image size, the authors' other layouts."""

import pytest
import torch
from torch import nn

import attnlab
from attnlab.cost import count_flops
from attnlab.hub import load_official
from attnlab.models.vision.biformer import CONVOLUTION, FULL, SIZES, BiFormer, FullAttention
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.bilevel_routing import BilevelRouting

TINY = {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1), "head_dim": 4, "regions": 2, "topk": (1, 2, 3, -2)}
# Millions of parameters and GFLOPs (multiply-adds) at 224×224, arXiv 2303.08810 table 2 and the authors' README.
PUBLISHED = {
    "biformer_tiny": (13.1, 2.2),
    "biformer_small": (25.5, 4.5),
    "biformer_base": (56.8, 9.8),
    "biformer_stl": (28.4, 4.6),
}


def test_sizes_are_those_of_the_authors_tables():
    for name, (millions, _) in PUBLISHED.items():
        assert SIZES[name].params / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl"])
def test_costs_what_the_paper_says(name):
    net = attnlab.build(name).eval()
    with torch.no_grad():
        flops = count_flops(net, torch.randn(1, 3, 224, 224))
    assert flops / 2e9 == pytest.approx(PUBLISHED[name][1], abs=0.11)


def test_the_last_stage_attends_fully_with_eight_heads():
    net = BiFormer(**TINY)
    routed = [block.mixer for stage in net.stages[:3] for block in stage.blocks]
    assert [(m.regions, m.topk, m.heads) for m in routed] == [(2, 1, 2), (2, 2, 2), (2, 3, 4), (2, 3, 4)]
    assert all(isinstance(m, BilevelRouting) and m.wqkv.bias is not None for m in routed)
    last = net.stages[3].blocks[0].mixer
    assert isinstance(last, FullAttention) and last.heads == 8 and last.wqkv.bias is None


def test_full_attention_with_its_convolution_off_is_multi_head_attention():
    torch.manual_seed(0)
    ours, plain = FullAttention(16, heads=2, local=0), MultiHead(16, heads=2, out_bias=True)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 12, 16)
    torch.testing.assert_close(ours(x, grid=(3, 4)), plain(x))


def test_the_convolution_of_full_attention_acts_on_its_input():
    m = FullAttention(16, heads=2, local=3)
    nn.init.zeros_(m.wqkv.weight)
    x = torch.randn(2, 12, 16)
    convolved = m.lepe(x.transpose(1, 2).unflatten(2, (3, 4))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(m(x, grid=(3, 4)), m.wo(convolved))


@pytest.mark.parametrize("size", [(64, 64), (45, 70), (33, 128)])
@pytest.mark.parametrize("keywords", [{}, {"swin_layout": True, "norm": nn.BatchNorm2d}], ids=["biformer", "stl"])
def test_takes_any_image_size(size, keywords):
    net = BiFormer(**TINY, **keywords, num_classes=5).eval()
    maps = net.forward_features(torch.randn(2, 3, *size))
    assert [m.shape[1] for m in maps] == [8, 8, 16, 16]
    assert net(torch.randn(2, 3, *size)).shape == (2, 5)


def test_a_stage_may_convolve_or_attend_fully_instead():
    net = BiFormer(**{**TINY, "topk": (CONVOLUTION, 1, FULL, FULL)}, num_classes=5)
    assert isinstance(net.stages[0].blocks[0].mixer, nn.Sequential)
    assert net.stages[2].blocks[0].mixer.lepe is None
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize("keywords", [{"pre_norm": False, "layer_scale": 0.5}, {"local_mlp": True}])
def test_the_authors_other_blocks_train(keywords):
    net = BiFormer(**TINY, **keywords, num_classes=5)
    net(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_a_block_normed_after_the_sum_is_normed_after_the_sum():
    net = BiFormer(**TINY, pre_norm=False)
    out = net.stages[0].blocks[0](torch.randn(2, 8, 4, 4)).movedim(1, -1)
    torch.testing.assert_close(out.mean(-1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)


def test_a_checkpoint_of_the_authors_swin_layout_loads(tmp_path):
    ours = BiFormer(**TINY, swin_layout=True, num_classes=5)
    theirs = {}
    for name, tensor in ours.state_dict().items():
        for new, old in (("mixer.wqkv", "attn.qkv" if "stages.3" in name else "attn.qkv.qkv"), ("mixer.", "attn."),
                         ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.2"), ("stem.conv", "downsample_layers.0.0"),
                         ("stem.norm", "downsample_layers.0.1")):  # fmt: skip
            name = name.replace(new, old)
        if "stages.3" in name:
            name = name.replace("attn.wo", "attn.proj")
        if "downsample." in name:
            _, stage, _, part, rest = name.split(".", 4)
            name = f"downsample_layers.{stage}.{'norm conv'.split().index(part)}.{rest}"
        theirs[name] = tensor
    assert "stages.2.blocks.1.attn.qkv.qkv.bias" in theirs and "downsample_layers.3.0.running_var" in theirs
    other = BiFormer(**TINY, swin_layout=True, num_classes=5)
    torch.save({"model": theirs}, tmp_path / "biformer_stl.pth")
    load_official(other, tmp_path / "biformer_stl.pth")
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), other.state_dict().values(), strict=True))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"topk must have one number per stage \(4\), got 3"):
        BiFormer(**{**TINY, "topk": (1, 2, 3)})
    with pytest.raises(ValueError, match="topk must lie between 1 and regions² = 4, got 9"):
        BiFormer(**{**TINY, "topk": (1, 2, 9, -2)})
