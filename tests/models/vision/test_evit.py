"""EViT: the paper's cost, timm's DeiT when all is kept, how many tokens are left, and what becomes of the others."""

import math

import pytest
import torch

import attnlab
from attnlab.cost import count_flops
from attnlab.hub.official.evit import EViT as Official
from attnlab.models.skeletons.plain import TokenBlock
from attnlab.models.vision.evit import EViT, run_block
from attnlab.nn.multihead import MultiHead
from attnlab.nn.tokens.reorganize import class_attention, reorganize
from attnlab.recipes.evit import keep_rate

TINY = {"dim": 16, "depth": 4, "heads": 2, "image": 32, "patch": 8, "num_classes": 5, "drop_at": (1, 2)}


# GMACs of DeiT-S at 224×224 with fusion, as the paper has them (Table 1; 4.6 without pruning).
@pytest.mark.parametrize(("keep", "published"), [(0.9, 4.0), (0.7, 3.0), (0.5, 2.3)])
def test_costs_what_the_paper_says(keep, published):
    with torch.device("meta"), torch.no_grad():
        net = attnlab.build("evit_small", keep=keep).eval()
        flops = count_flops(net, torch.randn(1, 3, 224, 224))
    assert flops / 2e9 == pytest.approx(published, abs=0.06)


def test_equals_timms_deit_while_all_is_kept(timm):
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 7}
    theirs = timm.models.VisionTransformer(**arguments).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = Official.build({**arguments, "keep_rate": (1, 0.5, 1), "fuse_token": True}, theirs.state_dict()).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x, keep=1.0), theirs(x))
    assert not torch.allclose(ours(x), theirs(x))


def test_equals_timms_distilled_deit_while_all_is_kept(timm):
    from timm.models.deit import VisionTransformerDistilled

    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 7}
    theirs = VisionTransformerDistilled(**arguments).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = Official.build({**arguments, "keep_rate": (1, 0.5, 1), "fuse_token": True}, theirs.state_dict()).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x, keep=1.0), theirs(x))
    first, second = ours.train()(x, keep=1.0)
    torch.testing.assert_close((first + second) / 2, theirs(x))
    assert ours.forward_features(x)[0].shape == (2, 24, 4, 4)
    # The second token stays, however little is looked at it.
    block, tokens = ours.encoder.blocks[0], torch.randn(1, 18, 24)
    left, places = run_block(block, tokens, 3, True, 2)
    assert left.shape == (1, 6, 24)
    whole = block(tokens)
    torch.testing.assert_close(left[:, :2], whole[:, :2])
    torch.testing.assert_close(left[0, 2:5], whole[0, 2 + places[0]])


@pytest.mark.parametrize("fuse", [True, False])
def test_keeps_the_ceiling_of_its_share_of_each_blocks_own_patches(fuse):
    net = EViT(**TINY, keep=(0.7, 0.3), fuse=fuse).eval()
    out = net.encode(net.embed(torch.randn(2, 3, 32, 40))[0])
    first = math.ceil(0.7 * 20)
    second = math.ceil(0.3 * (first + fuse))
    assert [k.shape for k in out.kept] == [(2, first), (2, second)]
    assert out.tokens.shape[1] == 1 + second + fuse
    exact = net.encode(net.embed(torch.randn(2, 3, 32, 32))[0], counts=(9, 4))
    assert exact.tokens.shape[1] == 1 + 4 + fuse


def test_agrees_with_the_equations_written_out():
    """One image, one token at a time, every weight of the attention computed."""
    torch.manual_seed(3)
    block = TokenBlock(8, MultiHead(8, heads=2, bias=True, out_bias=True)).double()
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    y, places = run_block(block, x, 3)
    weights = block.mixer.weights(block.norm1(x))[0]
    score = [sum(weights[h, 0, 1 + j].item() for h in range(2)) / 2 for j in range(6)]
    order = sorted(range(6), key=lambda j: -score[j])
    assert places[0].tolist() == order[:3]
    z = (x + block.mixer(block.norm1(x)))[0]
    fused = sum(score[j] * z[1 + j] for j in order[3:])
    left = torch.stack([z[0], *(z[1 + j] for j in order[:3]), fused])
    torch.testing.assert_close(y[0], left + block.mlp(block.norm2(left)))
    assert sum(score[j] for j in order[3:]) < 1


def test_the_order_of_the_patches_does_not_matter_to_the_class_token():
    net = EViT(**TINY, keep=0.5).double().eval()
    tokens = torch.randn(2, 17, 16, dtype=torch.float64)
    order = torch.cat((torch.zeros(1, dtype=torch.long), 1 + torch.randperm(16)))
    torch.testing.assert_close(net.encode(tokens[:, order]).tokens[:, 0], net.encode(tokens).tokens[:, 0])


def test_scores_and_fused_tokens_carry_gradients():
    q, k = (torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, x: reorganize(x, class_attention(q, k), 2).tokens, (q, k, x))


def test_origins_say_which_patch_each_token_was():
    net = EViT(**TINY, keep=0.5).eval()
    x = torch.randn(1, 3, 32, 32)
    out = net.encode(net.embed(x)[0])
    # The second list counts in the first one's order, whose last is the fused token.
    first = [*out.kept[0][0].tolist(), 16]
    assert out.origins[0].tolist() == [first[i] for i in out.kept[1][0].tolist()] + [16]
    (found,) = net.forward_features(x)
    seen = found.abs().sum(1).flatten().nonzero().flatten().tolist()
    assert seen == sorted(p for p in out.origins[0].tolist() if p < 16)


def test_the_keep_rate_falls_from_one_to_its_base():
    rates = [keep_rate(step, start=10, end=30, base=0.6) for step in range(40)]
    assert rates[:11] == [1.0] * 11 and rates[30:] == [0.6] * 10
    assert rates == sorted(rates, reverse=True)
    assert rates[20] == pytest.approx(0.8)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"drop_at must name blocks from 0 to 3"):
        EViT(**{**TINY, "drop_at": (4,)})
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\]"):
        EViT(**TINY, keep=0.0)
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], once or for each"):
        EViT(**TINY)(torch.randn(1, 3, 32, 32), keep=(0.5,))
    with pytest.raises(ValueError, match="counts must hold one number"):
        EViT(**TINY)(torch.randn(1, 3, 32, 32), counts=(3,))
    with pytest.raises(ValueError, match="keep must lie in 1 to the number of tokens 16, got 17"):
        EViT(**TINY)(torch.randn(1, 3, 32, 32), counts=(17, 2))
    with pytest.raises(ValueError, match="class_token must be True"):
        EViT(**TINY, class_token=False)
    with pytest.raises(ValueError, match="start must be at least 0 and below end"):
        keep_rate(0, start=5, end=5)
    with pytest.raises(ValueError, match="score must be"):
        reorganize(torch.randn(1, 5, 4), torch.randn(1, 5), 2)
