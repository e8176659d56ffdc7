"""Few-shot classes from images and names: the steps one by one, every choice, and episodes that do not leak."""

import pytest
import torch
import torch.nn.functional as F

import attnlab
from attnlab.nn.sparse.nearest_keys import NearestKeys
from attnlab.recipes.ktpp import KTPP, PyramidPrompts, episode, interval


def ktpp(**settings) -> KTPP:
    vit = attnlab.build("vit", dim=16, depth=3, heads=2, image=16, patch=4, num_classes=0)
    return KTPP(vit, **{"text_dim": 12, "heads": 2, **settings})


def case(ways: int = 3) -> tuple[torch.Tensor, ...]:
    labels = torch.arange(ways).repeat(2)
    return torch.randn(2 * ways, 3, 16, 16), labels, torch.randn(4, 3, 16, 16), torch.randn(ways, 12)


def test_a_prompt_gathers_coarse_to_fine() -> None:
    pyramid = PyramidPrompts(8, (1, 2)).double()
    prompt, maps = torch.randn(2, 8, dtype=torch.float64), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    wanted = prompt
    for (q, k, v), size in zip(pyramid.maps, (4, 2), strict=True):
        places = F.avg_pool2d(maps, size).flatten(2).transpose(1, 2)
        weights = torch.einsum("bc,bnc->bn", q(wanted), k(places)).div(8**0.5).softmax(-1)
        wanted = wanted + torch.einsum("bn,bnc->bc", weights, v(places))
    torch.testing.assert_close(pyramid(prompt, maps), wanted)


def test_logits_are_cosines_with_the_classes_means() -> None:
    net = ktpp().eval()
    support, labels, query, texts = case()
    x, grid = net.tokens(support)
    known = torch.stack([net.prompted(x[i : i + 1], grid, texts[labels[i : i + 1]])[0] for i in range(6)])
    prototypes = torch.stack([known[labels == c].mean(0) for c in range(3)])
    wanted = 10 * F.cosine_similarity(net.features(query)[:, None], prototypes, dim=-1)
    torch.testing.assert_close(net(support, labels, query, texts), wanted, rtol=1e-4, atol=1e-4)


def test_a_gate_weighs_tokens_by_the_prompt() -> None:
    net = ktpp().double().eval()
    x, text = torch.randn(2, 16, 16, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)
    prompt = net.pyramid(net.to_prompt(F.normalize(text, dim=1)), x.mT.unflatten(2, (4, 4)))
    gated = x * (prompt @ net.weigh.weight.T + net.weigh.bias).sigmoid()[:, None]
    wanted = net.last(torch.cat((prompt[:, None], gated), 1))[:, 1:].mean(1)
    torch.testing.assert_close(net.prompted(x, (4, 4), text), wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"modulate": "film", "query_prompt": "mean"},
        {"modulate": "token", "query_prompt": "all", "readout": "prompt"},
        {"place": "replace", "context": "values", "alpha": 0.1},
    ],
    ids=["default", "film-mean", "token-all-prompt", "replace"],
)
def test_every_choice_runs_and_trains_all_of_itself(settings: dict) -> None:
    net = ktpp(**settings)
    logits = net(*case())
    assert logits.shape == (4, 3)
    logits.pow(2).sum().backward()
    # A map has no class token, whose last MLP's way nothing reads.
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_stages_stand_where_they_are_asked_for_with_fewer_and_fewer_keys() -> None:
    assert [stage.mixer.keep for stage in ktpp().stages] == [0.9, 0.7, 0.5]
    replaced = ktpp(place="replace", keep=(0.8, 0.4))
    kinds = [type(block.mixer) is NearestKeys for block in replaced.backbone.encoder.blocks]
    assert kinds == [False, True, True] and len(replaced.stages) == 0
    vit, images = (
        attnlab.build("vit", dim=16, depth=3, heads=2, image=16, patch=4, num_classes=0),
        torch.randn(2, 3, 16, 16),
    )
    before = vit.forward_features(images)[-1]
    KTPP(vit, text_dim=12, heads=2, keep=(1.0, 1.0), place="replace")  # with all keys, what the backbone learned
    torch.testing.assert_close(vit.forward_features(images)[-1], before)


def test_any_backbone_with_maps_will_do() -> None:
    net = KTPP(attnlab.build("stepnet", depths=(1, 1), dim=4, small=True, num_classes=0), text_dim=12, heads=2)
    assert net(*case()).shape == (4, 3)


def test_texts_of_other_classes_do_not_reach_the_visual_path() -> None:
    net = ktpp().eval()
    support, labels, query, texts = case()
    found, changed = net(support, labels, query, texts), texts.clone()
    changed[2] += 1
    other = net(support, labels, query, changed)
    torch.testing.assert_close(other[:, :2], found[:, :2])
    assert not torch.allclose(other[:, 2], found[:, 2])


def test_episodes_hold_each_sample_once() -> None:
    labels = torch.arange(60) % 6
    drawn = episode(labels, ways=4, shots=2, queries=3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(labels[drawn.support], drawn.classes.repeat_interleave(2))
    assert torch.equal(labels[drawn.query], drawn.classes.repeat_interleave(3))
    assert len(torch.cat((drawn.support, drawn.query)).unique()) == 20
    mean, half = interval(torch.tensor([0.4, 0.6, 0.5, 0.5]))
    assert mean == pytest.approx(0.5) and half == pytest.approx(1.96 * (0.02 / 3) ** 0.5 / 2)


def test_what_does_not_fit_is_named() -> None:
    support, labels, query, texts = case()
    with pytest.raises(ValueError, match="labels"):
        ktpp()(support, labels.clamp(max=1), query, texts)
    for settings, name in (
        ({"keep": (0.5, 0.9)}, "keep"),
        ({"modulate": "sum"}, "modulate"),
        ({"scales": ()}, "scales"),
    ):
        with pytest.raises(ValueError, match=name):
            ktpp(**settings)
    with pytest.raises(TypeError, match="backbone"):
        KTPP(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="ways"):
        episode(torch.arange(4), ways=5)
    with pytest.raises(ValueError, match="samples"):
        episode(torch.arange(4).repeat(3), ways=2, shots=1, queries=3)
