"""Token-aware pooling and the diversification loss: the limits, what gradients reach, and what they are for."""

import pytest
import torch
import torch.nn.functional as F

import attnlab
from attnlab.hub.official.tap_adl import PoolingTransformer
from attnlab.models.vision.rvt import RVT, RobustBlock
from attnlab.nn.conv_norm import fold_norms
from attnlab.nn.spatial.token_pooling import TokenPooling, dilated_mean
from attnlab.recipes.robust_attention import diversity_loss, pool_tokens, recorded


@pytest.mark.parametrize("dilation", [0, 1, 2, 3])
def test_a_dilated_mean_is_nine_zero_padded_neighbours_over_nine(dilation: int) -> None:
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    if dilation == 0:
        wanted = x
    else:
        unfolded = F.unfold(x, 3, dilation=dilation, padding=dilation)
        wanted = unfolded.view(2, 3, 9, 5, 4).mean(2)
    torch.testing.assert_close(dilated_mean(x, dilation), wanted)


def test_one_scale_is_the_plain_block() -> None:
    block, plain = RobustBlock(16, heads=2, scales=1).eval(), RobustBlock(16, heads=2, scales=0).eval()
    state = {n.replace("norm1.norm", "norm1"): t for n, t in block.state_dict().items() if "pool" not in n}
    plain.load_state_dict(state)
    x = torch.randn(2, 16, 5, 6)
    torch.testing.assert_close(block(x), plain(x), rtol=0, atol=0)


def test_folding_the_batch_norms_changes_nothing() -> None:
    torch.manual_seed(1)
    net = RVT(dims=(16, 32), depths=(1, 1), heads=(2, 4), num_classes=5)
    net(torch.randn(4, 3, 64, 64))
    images = torch.randn(2, 3, 64, 80)
    wanted = net.eval()(images)
    fold_norms(net)
    torch.testing.assert_close(net(images), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scales", "local"), [(4, True), (0, True), (0, False)])
def test_reads_the_authors_layout(scales: int, local: bool) -> None:
    net = RVT(dims=(16, 32), depths=(1, 1), heads=(2, 4), num_classes=5, scales=scales, local=local)
    theirs = {}
    for name, tensor in net.state_dict().items():
        for ours, official in (
            ("head.0.", "norm."),
            ("head.1.", "head."),
            ("stem.", "patch_embed.proj."),
            ("stages.1.downsample.", "pools.0.conv."),
            ("stages.", "transformers."),
            ("mixer.wqkv", "attn.qkv"),
            ("mixer.wo", "attn.proj"),
            ("norm1.pool.predict", "dilation_predictor.proj"),
            ("norm1.norm", "norm1"),
            ("mlp.fc1.norm", "mlp.bn1"),
            ("mlp.dwconv.norm", "mlp.bn2"),
            ("mlp.fc2.norm", "mlp.bn3"),
            (".conv.", "."),
        ):
            if ours != ".conv." or "mlp" in name:
                name = name.replace(ours, official)
        theirs[name] = tensor
    assert ("pools.0.conv.weight" in theirs) and not any("pool." in n or "mixer" in n for n in theirs)
    arguments = {"base_dims": [8, 8], "heads": [2, 4], "depth": [1, 1], "num_classes": 5, "num_scales": scales}
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(PoolingTransformer.build(arguments, theirs).eval()(images), net.eval()(images))


def test_flat_attention_costs_nothing_and_one_shared_token_costs_one() -> None:
    flat = torch.full((2, 2, 9, 9), 1 / 9)
    assert diversity_loss([flat], threshold=2.0) == 0
    peaked = torch.zeros(2, 2, 9, 9)
    peaked[..., 4] = 1
    torch.testing.assert_close(diversity_loss([peaked, peaked]), torch.tensor(1.0), rtol=0, atol=1e-5)
    some = (4 * torch.randn(3, 2, 9, 9)).softmax(-1)
    assert 0 <= diversity_loss([some]) <= 1


def test_one_image_at_a_time_is_the_batch_in_the_mean() -> None:
    maps = (3 * torch.randn(3, 2, 9, 9, dtype=torch.float64)).softmax(-1)
    alone = torch.stack([diversity_loss([maps[i : i + 1]], 1.0) for i in range(3)])
    torch.testing.assert_close(alone.mean(), diversity_loss([maps], 1.0))


def test_an_entry_under_the_threshold_has_a_gradient_only_where_the_mean_row_passes() -> None:
    maps = (3 * torch.randn(1, 1, 9, 9, dtype=torch.float64)).softmax(-1).requires_grad_()
    (gradient,) = torch.autograd.grad(diversity_loss([maps], 1.5), maps)
    low = (maps[0, 0] <= 1.5 / 9) & (maps[0, 0].mean(0) <= 1.5 / 9)
    assert low.any() and not gradient[0, 0][low].any()
    assert gradient.any()


def test_recording_changes_no_output_and_ends() -> None:
    vit, images = (
        attnlab.build("vit", dim=16, depth=2, heads=2, image=16, patch=4, num_classes=5),
        torch.randn(2, 3, 16, 16),
    )
    wanted = vit(images)
    with recorded(vit) as maps:
        torch.testing.assert_close(vit(images), wanted)
    assert [m.shape for m in maps] == [(2, 2, 17, 17)] * 2
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 2, 17))
    vit(images)
    assert len(maps) == 2


def test_a_plain_vit_takes_the_pooling_and_keeps_its_class_token_out_of_it() -> None:
    vit = pool_tokens(attnlab.build("vit", dim=16, depth=2, heads=2, image=16, patch=4, num_classes=5))
    images = torch.randn(4, 3, 16, 16)
    vit(images).pow(2).sum().backward()
    assert all(p.grad is not None for p in vit.parameters())
    x = torch.randn(2, 17, 16)
    block = vit.eval().encoder.blocks[0]
    before = block.pool(x[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)).flatten(2).mT
    seen = torch.cat((x[:, :1], before), 1)
    wanted = block.block.after(x, block.block.mixer(block.block.norm1(seen)))
    torch.testing.assert_close(block(x, grid=(4, 4)), wanted)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="scales"):
        TokenPooling(8, scales=0)
    with pytest.raises(ValueError, match="maps"):
        diversity_loss([])
    with pytest.raises(TypeError, match="MultiHead"), recorded(torch.nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match="heads"):
        RVT(dims=(8, 16), heads=(2,))
