"""The visual analytics of vision transformers on models: pruning through the tap, and the paper's claims on digits."""

import pytest
import torch
from torch.nn import functional as F

from attnlab import cards
from attnlab.lens.analytics import analyse
from attnlab.lens.importance import head_importance
from attnlab.lens.measures.pruning import Answer, changes
from attnlab.lens.measures.spatial import strength
from attnlab.models.skeletons.plain import Plain

DEPTH, HEADS = 4, 4


def network(depth=DEPTH):
    """16 patches and a class token."""
    return Plain(dim=48, depth=depth, mixer="multihead", mixer_options=dict(heads=HEADS), image=8, patch=2,
                 in_channels=1, num_classes=10)  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    """A transformer that reads digits, trained in seconds, and images that it has not seen."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    labels = torch.tensor(labels)
    torch.manual_seed(0)
    order = torch.randperm(len(images))
    images, labels = images[order], labels[order]
    model = network()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=400)
    for _ in range(400):
        batch = torch.randint(1400, (64,))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()
    test = images[1400:], labels[1400:]
    with torch.no_grad():
        assert (model(test[0]).argmax(-1) == test[1]).float().mean() > 0.88
    return model, *test


@pytest.fixture(scope="module")
def found(digits):
    model, images, labels = digits
    return analyse(model, images[:64], labels[:64], grid=(4, 4), epochs=10)


def by_hand(model, images, layer, heads):
    """What the model answers with the columns of the output projection that read these heads set to zero."""
    projection = model.encoder.blocks[layer].mixer.wo
    kept = projection.weight.detach().clone()
    size = kept.shape[1] // HEADS
    with torch.no_grad():
        for head in heads:
            projection.weight[:, head * size : (head + 1) * size] = 0
        answer = answer_of(model, images)
        projection.weight.copy_(kept)
    return answer


def answer_of(model, images):
    read = []
    handle = model.head.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0]))
    with torch.no_grad():
        logits = model(images)
    handle.remove()
    return Answer(logits, read[0])


@pytest.mark.parametrize("mode", ["leave_one_out", "keep_one"])
def test_pruning_at_the_tap_is_zeroing_the_projections_columns(digits, mode):
    model, images, labels = digits
    images, labels = images[:20], labels[:20]
    before = model(images)
    importance = head_importance(model, images, labels, mode=mode, batch=7)
    assert set(importance.scores) == {"jsd", "d_prob", "abs_d_pred", "acc_drop", "cls_cos"}
    assert importance.scores["jsd"].shape == (DEPTH, HEADS) and importance.mode == mode
    full = answer_of(model, images)
    for layer, head in ((0, 3), (2, 1)):
        heads = [head] if mode == "leave_one_out" else [h for h in range(HEADS) if h != head]
        for name, values in changes(full, by_hand(model, images, layer, heads), labels).items():
            torch.testing.assert_close(importance.scores[name][layer, head], values.mean(), rtol=1e-3, atol=1e-6)
    assert torch.equal(model(images), before)


def test_a_head_whose_output_is_not_read_has_importance_exactly_zero():
    model = network(2)
    with torch.no_grad():
        model.encoder.blocks[1].mixer.wo.weight[:, 24:36] = 0
    importance = head_importance(model, torch.randn(6, 1, 8, 8), torch.arange(6))
    assert all(scores[1, 2] == 0 for scores in importance.scores.values())
    assert importance.scores["jsd"][0].min() > 0


def test_a_pruned_head_can_say_its_mean_over_the_images():
    """Of images that are all alike, the mean is what the head says: nothing changes."""
    model = network(2)
    images = torch.randn(1, 1, 8, 8).expand(6, -1, -1, -1)
    importance = head_importance(model, images, torch.zeros(6).long(), ablate="mean", batch=4)
    assert importance.ablate == "mean" and importance.scores["jsd"].max() < 1e-8
    importance = head_importance(model, images, torch.zeros(6).long(), batch=4)
    assert importance.scores["jsd"].min() > 1e-8
    with pytest.raises(ValueError, match="ablate must be 'zero' or 'mean'"):
        head_importance(model, images, ablate="noise")


def test_the_model_is_left_as_it_was():
    model = network(1).train()
    model.encoder.blocks[0].eval()
    head_importance(model, torch.randn(2, 1, 8, 8))
    assert model.training and not model.encoder.blocks[0].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="labels must be"):
        head_importance(model, torch.randn(2, 1, 8, 8), torch.zeros(3).long())
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_the_most_important_heads_matter_more_than_the_least(digits):
    """The sheet's experiment: 4 of 16 heads pruned together, and metrics that agree."""
    model, images, labels = digits
    importance = head_importance(model, images, labels, batch=400)
    assert importance.classes.tolist() == list(range(10))

    def accuracy(heads):
        projections = [block.mixer.wo for block in model.encoder.blocks]
        kept = [p.weight.detach().clone() for p in projections]
        with torch.no_grad():
            for layer, head in heads:
                projections[layer].weight[:, head * 12 : (head + 1) * 12] = 0
            right = (model(images).argmax(-1) == labels).float().mean().item()
            for p, weight in zip(projections, kept, strict=True):
                p.weight.copy_(weight)
        return right

    most, least, all_heads = accuracy(importance.top(4)), accuracy(importance.top(-4)), accuracy([])
    assert all_heads - most > 0.1 + all_heads - least
    names, correlation = importance.correlation()
    assert correlation[names.index("jsd"), names.index("cls_cos")] > 0.5


def test_an_analysis_has_all_three_parts_and_draws_them(found, tmp_path):
    assert found.strength.sum.shape == (DEPTH, HEADS, 4)
    torch.testing.assert_close(
        found.strength.sum.sum(-1) + found.strength.prefix_share, torch.ones(DEPTH, HEADS), rtol=1e-4, atol=1e-4
    )
    assert found.maps.shape == (64 * DEPTH * HEADS, 16, 16)
    assert found.heads[:5] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)] and found.images[-1] == 63
    assert len(found.patterns.labels) == len(found.maps) and len(found.patterns.clusters.unique()) <= 6
    assert found.names == [f"encoder.blocks.{i}.mixer" for i in range(DEPTH)]
    drawn = found.figures(tmp_path / "figures")
    assert [p.name for p in drawn] == ["importance.png", "strength.png", "patterns.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 10_000 for p in drawn)


def test_strength_is_that_of_the_maps_which_transformers_returns(transformers):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=32, patch_size=8,
        initializer_range=0.5, num_labels=5,
    )  # fmt: skip
    model = transformers.ViTForImageClassification._from_config(config, attn_implementation="sdpa").eval()
    images = torch.randn(3, 3, 32, 32)
    analysis = analyse(model, images, grid=(4, 4), batch=2, epochs=1)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(model(images, output_attentions=True).attentions, 1)
    wanted = strength(maps, (4, 4))
    for name in ("sum", "mean", "query_sum", "prefix_share", "distance"):
        torch.testing.assert_close(getattr(analysis.strength, name), getattr(wanted, name), rtol=1e-4, atol=1e-5)
    first = maps[0, 1, 2, 1:, 1:]
    torch.testing.assert_close(analysis.maps[analysis.heads.index((1, 2))], first, rtol=1e-4, atol=1e-5)


def test_strength_is_that_of_the_maps_inside_timm(timm):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=4, reg_tokens=2).eval()
    images = torch.randn(2, 3, 64, 64)
    analysis = analyse(model, images, grid=(4, 4), epochs=1)
    maps = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, arguments, output: maps.append(output))
    with torch.no_grad():
        model(images)
    wanted = strength(torch.stack(maps, 1), (4, 4), prefix=3)
    torch.testing.assert_close(analysis.strength.sum, wanted.sum, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(analysis.strength.query_mean, wanted.query_mean, rtol=1e-4, atol=1e-5)


def test_a_grid_that_no_layer_has_is_refused():
    with pytest.raises(ValueError, match=r"no layer attends over a grid \(3, 3\); .*encoder.blocks.0.mixer 17"):
        analyse(network(1), torch.randn(2, 1, 8, 8), grid=(3, 3), prefix=1)


def test_the_card_says_what_it_is():
    card = cards.describe("vit_va")
    assert card.paper == "2303.13731" and card.kind is cards.LENS and cards.target("vit_va") is analyse
