"""Dual cross-attention learning: rollout, the closer look, images in pairs, and their losses."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnlab
from attnlab.models.skeletons.plain import Plain
from attnlab.models.vision.vit import ViT
from attnlab.nn.multihead import MultiHead
from attnlab.recipes.dcal import DCAL, Branch, UncertaintyWeights, partners, rollout, triplet_loss

TINY = {"dim": 8, "depth": 3, "heads": 2, "image": 16, "patch": 4, "num_classes": 3}


def make(**keywords) -> DCAL:
    torch.manual_seed(0)
    net = DCAL(ViT(**TINY), **keywords).double()
    for p in net.backbone.parameters():
        nn.init.normal_(p, std=0.4)
    return net


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 16, 16, dtype=torch.float64)


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_rollout_is_the_row_of_the_product_over_layers(fusion: str) -> None:
    layers = [(torch.randn(2, 3, 5, 4).double(), torch.randn(2, 3, 5, 4).double()) for _ in range(3)]
    whole = torch.eye(5, dtype=torch.float64)
    for q, k in layers:
        weights = (q @ k.mT / 2).softmax(-1)
        fused = weights.mean(1) if fusion == "mean" else getattr(weights, f"a{fusion}")(1)
        whole = (0.5 * fused + 0.5 * torch.eye(5)) @ whole
    for row in (0, 3):
        torch.testing.assert_close(rollout(layers, fusion, row), whole[:, row])
    if fusion == "mean":
        torch.testing.assert_close(rollout(layers).sum(1), torch.ones(2, dtype=torch.float64))
    alone = [(1e3 * torch.eye(5)[None, None], 1e3 * torch.eye(5)[None, None])] * 3  # each token sees itself alone
    assert torch.equal(rollout(alone), torch.eye(5)[:1])


@torch.no_grad()
def test_all_patches_make_the_closer_look_an_ordinary_block() -> None:
    net, x = make(ratio=1.0).eval(), images()
    tokens = net.run(net.backbone.embed(x)[0])[0]
    wanted = net.head(net.norm(net.block(tokens[-1])[:, 0]))
    torch.testing.assert_close(net.branches(x).closer.logits, wanted)
    first = make(ratio=1.0, source="penultimate").eval()
    tokens = first.run(first.backbone.embed(x)[0])[0]
    torch.testing.assert_close(first.branches(x).closer.feature, first.norm(first.block(tokens[-2])[:, 0]))


@torch.no_grad()
def test_the_closer_look_asks_with_the_patches_that_rank_highest_and_the_class_token() -> None:
    net, x = make(ratio=0.25).eval(), images()
    layers = net.run(net.backbone.embed(x)[0])[1]
    chosen = net.select(layers)
    assert chosen.shape == (4, 1 + 4) and not chosen[:, 0].any()
    rank = rollout([(q, k) for q, k, _ in layers])
    for b in range(4):
        left = sorted(set(range(1, 17)) - set(chosen[b].tolist()))
        assert rank[b, chosen[b, 1:]].min() >= rank[b, left].max()
    same = [(torch.zeros_like(q), torch.zeros_like(k), v) for q, k, v in layers]
    assert net.select(same)[0].tolist() == [0, 1, 2, 3, 4]  # ties by place
    for ratio, rounding, count in ((0.29, "floor", 4), (0.29, "ceil", 5), (0.01, "floor", 1)):
        assert make(ratio=ratio, rounding=rounding).select(layers).shape[1] == 1 + count


@torch.no_grad()
def test_classes_do_not_hang_on_which_patches_are_chosen() -> None:
    net, x = make().eval(), images()
    tokens = net.run(net.backbone.embed(x)[0])[0][-1]
    first, other = (net.look_closer(tokens, torch.tensor([chosen]).expand(4, -1)) for chosen in ((0, 1, 2), (0, 7, 9)))
    torch.testing.assert_close(first[:, 0], other[:, 0])
    assert not torch.allclose(first[:, 1:], other[:, 1:])


@torch.no_grad()
def test_an_image_paired_with_itself_is_as_if_alone_and_with_another_it_is_not() -> None:
    net, x = make().eval(), images()
    x = net.backbone.embed(x)[0]
    own, layers = net.run(x)
    torch.testing.assert_close(net.run(x, torch.arange(4))[0][-1], own[-1])
    disturbed = net.run(x, torch.tensor([1, 0, 3, 2]))[0][-1]
    assert not torch.allclose(disturbed, own[-1])
    other = x.clone()
    other[1] += torch.randn_like(other[1])
    changed = net.run(other, torch.tensor([1, 0, 3, 2]))[0][-1]
    assert not torch.allclose(changed[0], disturbed[0])
    torch.testing.assert_close(changed[2:], disturbed[2:])
    # Undisturbed partners differ from disturbed ones from the second block on.
    undisturbed = net.run(x, torch.tensor([1, 0, 3, 2]), layers)[0]
    again = net.run(x, torch.tensor([1, 0, 3, 2]))[0]
    torch.testing.assert_close(undisturbed[1], again[1])
    assert not torch.allclose(undisturbed[2], again[2])


def test_pairs_equal_timms_block_over_both_images(timm) -> None:
    from timm.models.vision_transformer import Block

    theirs = Block(8, 2, qkv_bias=True).double().eval()
    nn.init.normal_(theirs.attn.qkv.weight)
    backbone = Plain(
        dim=8,
        depth=1,
        mixer=lambda _: MultiHead(8, heads=2, bias=True),
        image=4,
        patch=2,
        num_classes=2,
        norm=partial(nn.LayerNorm, eps=1e-6),
    )
    net = DCAL(backbone).double().eval()
    state = theirs.state_dict()
    renamed = {n.replace("attn.qkv", "mixer.wqkv").replace("attn.proj", "mixer.wo"): p for n, p in state.items()}
    backbone.encoder.blocks[0].load_state_dict(renamed)
    x, pairs = torch.randn(2, 5, 8).double(), torch.tensor([1, 0])
    with torch.no_grad():
        alone = net.run(x)[0][-1]
        torch.testing.assert_close(alone, theirs(x))
        both = torch.cat((x, x[pairs]), 1)  # tokens of both images ask both; those of the first are kept
        torch.testing.assert_close(net.run(x, pairs)[0][-1], theirs(both)[:, :5])


def test_partners_are_permutations_and_derangements_have_no_fixed_point() -> None:
    for batch in (2, 3, 8):
        for _ in range(20):
            pairs = partners(batch)
            assert sorted(pairs.tolist()) == list(range(batch))
            assert not (pairs == torch.arange(batch)).any()
    assert partners(4, "flip").tolist() == [3, 2, 1, 0]
    assert sorted(partners(5, "permutation").tolist()) == list(range(5))
    draw = [partners(9, generator=torch.Generator().manual_seed(1)).tolist() for _ in range(2)]
    assert draw[0] == draw[1]


def test_the_loss_weighs_by_learned_uncertainty_and_reaches_every_parameter() -> None:
    weigh = UncertaintyWeights(2, -1.0)
    with torch.no_grad():
        weigh.weights[1] = 0.5
    wanted = 0.5 * (math.e * 2 + math.exp(-0.5) * 3 - 1.0 + 0.5)
    assert weigh([torch.tensor(2.0), torch.tensor(3.0)]).item() == pytest.approx(wanted)
    net, labels = make(share_head=False).train(), torch.tensor([0, 1, 2, 1])
    net.loss(net.branches(images()), labels).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []

    def both(branch: Branch, y: Tensor) -> Tensor:
        return F.cross_entropy(branch.logits, y) + triplet_loss(branch.feature, y)

    branches, labels = net.branches(images()), torch.tensor([0, 1, 0, 1])
    torch.testing.assert_close(net.loss(branches, labels, both), net.weigh([both(b, labels) for b in branches]))


def test_the_triplet_is_the_hardest() -> None:
    x = torch.tensor([[0.0, 0], [3, 0], [0, 1], [9, 9]])
    labels = torch.tensor([0, 0, 1, 2])
    # Image 0: far 3, near 1; image 1: far 3, near √10; images 2 and 3 have no second of their label.
    assert triplet_loss(x, labels, 0.3).item() == pytest.approx((3 - 1 + 0.3 + 3 - math.sqrt(10) + 0.3) / 2)


@torch.no_grad()
def test_inference_needs_one_image_and_no_pairs() -> None:
    net, x = make().eval(), images(1)
    branches = net.branches(x)
    assert branches.pairwise is None
    torch.testing.assert_close(net(x).sum(1), torch.full((1,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(net(x), sum(b.logits.softmax(-1) for b in branches[:2]))
    assert net.features(x).norm(dim=1).item() == pytest.approx(1.0) and net.features(x).shape == (1, 16)


def test_adds_one_block_and_its_classifier() -> None:
    with torch.device("meta"):
        backbone = attnlab.build("deit_tiny_patch16_224", num_classes=100)
        before = sum(p.numel() for p in backbone.parameters())
        added = sum(p.numel() for p in DCAL(backbone).parameters()) - before
    block, norm, head, weights = 444_864, 2 * 192, 192 * 100 + 100, 3
    assert added == block + norm + head + weights


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make(ratio=0.0), ValueError, r"ratio must be in \(0, 1\]"),
        (lambda: make(pairing="all"), ValueError, "pairing must be one of"),
        (lambda: DCAL(nn.Linear(2, 2)), TypeError, "backbone must be a Plain network with a class token"),
        (lambda: DCAL(ViT(**TINY, class_token=False)), TypeError, "with a class token"),
        (lambda: DCAL(ViT(**{**TINY, "num_classes": 0})), ValueError, "backbone must have a classifier"),
        (lambda: DCAL(Plain(dim=8, depth=1, mixer="linear", image=8, patch=4)), TypeError, "must mix by MultiHead"),
        (lambda: make().train().branches(images(1)), ValueError, "a derangement needs a batch of at least 2"),
        (lambda: make().loss(make().eval().branches(images()), torch.zeros(4)), ValueError, "come from training mode"),
        (lambda: triplet_loss(torch.zeros(2, 3), torch.tensor([0, 1])), ValueError, "two images of one label"),
        (lambda: partners(3, "shift"), ValueError, "pairing must be"),
        (lambda: rollout([]), ValueError, "layers must hold q and k"),
        (lambda: UncertaintyWeights(2)([torch.ones(())]), ValueError, "losses must be 2, got 1"),
    ],
)
def test_errors_name_what_is_wrong(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
