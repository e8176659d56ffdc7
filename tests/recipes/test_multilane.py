"""Lanes beside a frozen ViT: they are independent, the ViT stays as it was, and old tasks keep what they learned."""

import pytest
import torch
import torch.nn.functional as F

import attnlab
from attnlab.recipes.multilane import MultiLane, average_precision, f1, forgetting, lane_block, merged, summarise

CLASSES = [[0, 1], [2, 3], [4]]


def model(**settings) -> MultiLane:
    vit = attnlab.build("vit", dim=16, depth=3, heads=2, image=16, patch=4, num_classes=0)
    return MultiLane(vit, CLASSES, **{"selectors": 4, "prompts": 3, "layers": 2, **settings})


def test_summaries_are_means_by_softmax_over_the_patches() -> None:
    x, selectors = torch.randn(2, 7, 8, dtype=torch.float64), torch.randn(2, 3, 4, 8, dtype=torch.float64)
    weights = torch.einsum("btsc,bnc->btsn", selectors, x).div(8**0.5).softmax(-1)
    torch.testing.assert_close(summarise(selectors, x), torch.einsum("btsn,bnc->btsc", weights, x))
    torch.testing.assert_close(summarise(selectors, torch.ones_like(x)), torch.ones_like(selectors))


def test_a_block_equals_the_authors_order_of_steps() -> None:
    """Every row of the lane attended, only the class token's kept, the normed selectors in place of the rest."""
    net = model().double()
    block, prefix = net.backbone.encoder.blocks[0], net.prompts[0]
    x, lanes = torch.randn(2, 9, 16, dtype=torch.float64), torch.randn(2, 3, 5, 16, dtype=torch.float64)
    seen, u = block.norm1(x), block.norm1(lanes)
    rows = torch.cat((u[:, :, :1], summarise(u[:, :, 1:], seen)), 2)
    wanted = []
    for task in range(3):
        q, k, v = block.mixer.project(rows[:, task])
        own = prefix[:, task].transpose(1, 2).unsqueeze(1).expand(-1, 2, -1, -1, -1)
        k, v = torch.cat((own[0], k), 2), torch.cat((own[1], v), 2)
        y = block.mixer.merge((q @ k.mT / 8**0.5).softmax(-1) @ v)
        lane = lanes[:, task] + torch.cat((y[:, :1], u[:, task, 1:]), 1)
        wanted.append(lane + block.mlp(block.norm2(lane)))
    found_x, found = lane_block(block, x, lanes, prefix)
    torch.testing.assert_close(found, torch.stack(wanted, 1))
    torch.testing.assert_close(found_x, block(x))


def alike_joined(x: torch.Tensor, most: int) -> torch.Tensor:
    """One sequence (N, C): token merging by loops, as the ablation of the authors' code does it."""
    while len(x) > most:
        sources, targets = x[0::2], x[1::2]
        found = []
        for i in range(1, len(sources)):
            likes = [F.cosine_similarity(sources[i], t, dim=0).item() for t in targets]
            found.append((max(likes), i, likes.index(max(likes))))
        gone = sorted(found, reverse=True)[: min(len(x) // 2, (len(x) - 1) // 2)]
        stay = [s for i, s in enumerate(sources) if i not in {g[1] for g in gone}]
        joined = [torch.stack([t, *(sources[i] for _, i, j in gone if j == n)]).mean(0) for n, t in enumerate(targets)]
        x = torch.stack(stay + joined)
    return x


@pytest.mark.parametrize(("count", "most"), [(17, 4), (16, 5), (33, 20), (7, 9)])
def test_alike_tokens_are_averaged_until_few_are_left_and_never_the_class_token(count, most) -> None:
    x = torch.randn(2, count, 6, dtype=torch.float64)
    found = merged(x, most)
    torch.testing.assert_close(found, torch.stack([alike_joined(s, most) for s in x]))
    assert torch.equal(found[:, 0], x[:, 0]) and found.shape[1] <= most


def by_hand(block, rows: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """All rows of one lane's attention."""
    q, k, v = block.mixer.project(rows)
    own = prefix.transpose(1, 2).unsqueeze(1).expand(-1, len(rows), -1, -1, -1)
    return block.mixer.merge((q @ torch.cat((own[0], k), 2).mT / 8**0.5).softmax(-1) @ torch.cat((own[1], v), 2))


def test_without_replacing_lanes_summarise_once_and_then_attend_to_themselves() -> None:
    net = model(replace=False).double()
    block, prefix = net.backbone.encoder.blocks[0], net.prompts[0]
    x, lanes = torch.randn(2, 9, 16, dtype=torch.float64), torch.randn(2, 3, 5, 16, dtype=torch.float64)
    seen, u = block.norm1(x), block.norm1(lanes)
    for first in (True, False):
        rows = torch.cat((u[:, :, :1], summarise(u[:, :, 1:], seen)), 2) if first else u
        out = torch.stack([by_hand(block, rows[:, t], prefix[:, t]) for t in range(3)], 1)
        lane = lanes + out
        found = lane_block(block, x, lanes, prefix, replace=False, first=first)[1]
        torch.testing.assert_close(found, lane + block.mlp(block.norm2(lane)))
    images = torch.randn(2, 3, 16, 16)
    kept = MultiLane(net.backbone.float(), CLASSES, selectors=4, prompts=3, layers=2)
    kept.load_state_dict(net.state_dict())
    assert not torch.allclose(net.float().eval()(images), kept.eval()(images))


def test_merging_makes_lanes_of_the_frozen_tokens_that_differ_by_their_prompts_alone() -> None:
    net = model(merge=True, layers=1).double()
    block, prefix = net.backbone.encoder.blocks[0], net.prompts[0]
    x, lanes = torch.randn(2, 9, 16, dtype=torch.float64), torch.randn(2, 3, 1, 16, dtype=torch.float64)
    rows = merged(block.norm1(x), 4)
    lane = lanes + torch.stack([by_hand(block, rows, prefix[:, t])[:, :1] for t in range(3)], 1)
    torch.testing.assert_close(
        lane_block(block, x, lanes, prefix, merge=4)[1], lane + block.mlp(block.norm2(lane))
    )  # fmt: skip
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    found = net.eval().lanes(images, slice(0, 3))[0]
    assert not torch.allclose(found[:, 0], found[:, 1])
    with torch.no_grad():
        net.prompts[0][:, 1] = net.prompts[0][:, 0]
    found = net.lanes(images, slice(0, 3))[0]
    torch.testing.assert_close(found[:, 0], found[:, 1])
    net.train()
    net.next_task()
    net.loss(net(images), torch.tensor([2, 3])).backward()
    assert net.prompts[0].grad[:, 1].any() and not net.prompts[0].grad[:, 0].any()


def test_all_lanes_together_are_each_alone() -> None:
    net, images = model().eval(), torch.randn(2, 3, 16, 16)
    together, frozen = net.lanes(images, slice(0, 3))
    for task in range(3):
        torch.testing.assert_close(net.lanes(images, slice(task, task + 1))[0], together[:, task : task + 1])
    with torch.no_grad():
        net.selectors[1] += 1
        net.prompts[0][:, 1] += 1
    changed, _ = net.lanes(images, slice(0, 3))
    torch.testing.assert_close(changed[:, [0, 2]], together[:, [0, 2]])
    assert not torch.allclose(changed[:, 1], together[:, 1])
    torch.testing.assert_close(frozen, net.backbone(images))


def test_training_runs_the_current_lane_and_leaves_the_others_and_the_vit_alone() -> None:
    net, images = model().train(), torch.randn(2, 3, 16, 16)
    assert not net.backbone.training
    net.next_task()
    targets = torch.randint(0, 2, (2, 5))
    net.loss(net(images), targets).backward()
    assert net.selectors.grad[1].any() and not net.selectors.grad[[0, 2]].any()
    for prompts in net.prompts:
        assert prompts.grad[:, 1].any() and not prompts.grad[:, [0, 2]].any()
    assert all(p.grad is None for p in net.backbone.parameters())
    assert net.head.weight.grad[2:4].any() and not net.head.weight.grad[[0, 1, 4]].any()


def test_evaluation_asks_each_lane_for_its_own_classes() -> None:
    net, images = model(), torch.randn(2, 3, 16, 16)
    net.next_task()
    net.eval()
    logits = net(images)
    lanes = net.lanes(images, slice(0, 2))[0]
    torch.testing.assert_close(logits[:, :2], net.head(lanes[:, 0])[:, :2])
    torch.testing.assert_close(logits[:, 2:4], net.head(lanes[:, 1])[:, 2:4])
    assert not logits[:, 4].any()


def test_losses_hold_other_classes_out() -> None:
    net, logits = model(), torch.randn(3, 5)
    targets = torch.ones(3, 5)
    own = F.binary_cross_entropy_with_logits(logits[:, :2], targets[:, :2], reduction="sum")
    torch.testing.assert_close(net.loss(logits, targets), (own + 9 * torch.tensor(2.0).log()) / 15)
    labels = torch.tensor([0, 1, 1])
    torch.testing.assert_close(net.loss(logits, labels), F.cross_entropy(logits[:, :2], labels))


def test_a_new_lane_is_a_copy_and_the_state_knows_the_task() -> None:
    net = model()
    net.next_task()
    assert torch.equal(net.selectors[1], net.selectors[0]) and torch.equal(net.prompts[1][:, 1], net.prompts[1][:, 0])
    other = model()
    other.load_state_dict(net.state_dict())
    assert other.task == 1
    other.next_task()
    with pytest.raises(ValueError, match="3 tasks"):
        other.next_task()


def test_keys_choose_one_lane() -> None:
    net, images = model(matched=True), torch.randn(2, 3, 16, 16)
    net.next_task()
    net.train()
    net.key_loss(images).backward()
    assert net.keys.grad[1].any() and not net.keys.grad[0].any()
    net.eval()
    lanes, frozen = net.lanes(images, slice(0, 2))
    net.keys.data[0], net.keys.data[1] = frozen.mean(0), -frozen.mean(0)
    torch.testing.assert_close(net(images), net.head(lanes[:, 0]))
    with pytest.raises(ValueError, match="matched"):
        model().key_loss(images)


def test_parameters_per_task_are_the_papers() -> None:
    with torch.device("meta"):
        net = MultiLane(attnlab.build("vit_base_patch16_224", num_classes=0), CLASSES)
    trained = sum(p.numel() for n, p in net.named_parameters() if p.requires_grad and not n.startswith("head"))
    assert trained == 3 * 168_960


def test_the_frozen_stream_is_timms(timm) -> None:
    from attnlab.hub.renaming import load, rename

    peer = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=0
    ).eval()
    net = model().eval()
    rules = (
        (r"^patch_embed\.proj", "patches"), (r"^blocks", "encoder.blocks"), (r"^norm", "encoder.norm"),
        (r"attn\.qkv", "mixer.wqkv"), (r"attn\.proj", "mixer.wo"), (r"^cls_token", "class_token"),
        (r"^pos_embed", "positions.table"),
    )  # fmt: skip
    params = rename(peer.state_dict(), rules)
    params["class_token"], params["positions.table"] = params["class_token"][0, 0], params["positions.table"][0]
    load(net.backbone, params)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(net.lanes(images, slice(0, 1))[1], peer(images), rtol=1e-4, atol=1e-5)


def test_measures_agree_with_their_definitions() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores, targets = torch.rand(30, 4), torch.randint(0, 2, (30, 4))
    wanted = [metrics.average_precision_score(t, s) for t, s in zip(targets.T.numpy(), scores.T.numpy(), strict=True)]
    torch.testing.assert_close(average_precision(scores, targets), torch.tensor(wanted).float())
    overall = metrics.f1_score(targets.numpy(), (scores > 0.8).numpy(), average="micro")
    assert f1(scores, targets)[0] == pytest.approx(overall)
    accuracy = torch.tensor([[0.9, 0, 0], [0.7, 0.8, 0], [0.5, 0.9, 1.0]])
    assert forgetting(accuracy) == pytest.approx((0.4 - 0.1) / 2)


def test_what_does_not_fit_is_named() -> None:
    vit = attnlab.build("vit", dim=16, depth=2, heads=2, image=16, patch=4)
    for wrong, name in (({"classes": [[0], [0]]}, "classes"), ({"layers": 3}, "layers")):
        with pytest.raises(ValueError, match=name):
            MultiLane(vit, **{"classes": CLASSES, "layers": 1, **wrong})
    with pytest.raises(ValueError, match="merge wants prompts"):
        model(merge=True, replace=False)
    with pytest.raises(TypeError, match="backbone"):
        MultiLane(
            attnlab.build("vit", dim=16, depth=2, heads=2, image=16, patch=4, class_token=False), CLASSES, layers=1
        )
    with pytest.raises(ValueError, match="targets"):
        model().loss(torch.randn(2, 5), torch.ones(2, 4))
