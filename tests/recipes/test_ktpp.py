"""KTPP: episodes, the pyramid of prompts, what a prompt does to its tokens, and a few-shot task learnt."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.models.vision.vit import ViT
from attnlab.nn.sparse.knn_context import KNNContext
from attnlab.recipes.ktpp import KTPP, PyramidPrompts, draw_episode, few_shot_accuracy

TINY = {"dim": 8, "depth": 3, "heads": 2, "image": 16, "patch": 4, "num_classes": 0, "class_token": False}
WAYS, SHOTS, QUERIES = 3, 2, 4


def make(**keywords) -> KTPP:
    torch.manual_seed(0)
    backbone = ViT(**{**TINY, "class_token": keywords.get("place") == "replace", "num_classes": 2})
    net = KTPP(backbone, **{"text_dim": 6, "heads": 2, **keywords}).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def episode() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(WAYS, SHOTS, 3, 16, 16).double(),
        torch.randn(QUERIES, 3, 16, 16).double(),
        torch.randn(WAYS, 6).double(),
    )


@torch.no_grad()
def test_the_pyramid_reads_each_scale_in_turn() -> None:
    torch.manual_seed(0)
    pyramid = PyramidPrompts(8, (1, 2)).double()
    prompts, maps = torch.randn(WAYS, 8).double(), torch.randn(WAYS, SHOTS, 8, 4, 4).double()
    for c in range(WAYS):
        p = prompts[c]
        for scale, wq, wkv in zip((1, 2), pyramid.wq, pyramid.wkv, strict=True):
            size = 4 // scale
            cells = [
                maps[c, s, :, y * size : (y + 1) * size, x * size : (x + 1) * size].mean((1, 2))
                for s in range(SHOTS)
                for y in range(scale)
                for x in range(scale)
            ]
            k, v = wkv(torch.stack(cells)).split(8, -1)
            p = p + (k @ wq(p) / 8**0.5).softmax(0) @ v
        torch.testing.assert_close(pyramid(prompts, maps)[c], p)


@pytest.mark.parametrize("modulate", ["gate", "film", "token"])
@pytest.mark.parametrize(
    ("query_prompt", "readout"),
    [("none", "mean"), ("mean", "mean"), ("all", "mean"), ("mean", "prompt"), ("all", "prompt")],
)
@torch.no_grad()
def test_logits_are_those_of_the_equations_image_by_image(modulate: str, query_prompt: str, readout: str) -> None:
    net = make(modulate=modulate, query_prompt=query_prompt, readout=readout).eval()
    support, queries, texts = episode()

    def tokens(image: Tensor) -> Tensor:
        x = net.backbone.forward_features(image[None])[-1].flatten(2).mT
        for stage in net.stages:
            x = stage(x)
        return x[0]

    def feature(z: Tensor, p: Tensor | None) -> Tensor:
        if p is None:
            return net.block(z[None])[0].mean(0)
        said = None if net.modulator is None else net.modulator(p)
        if modulate == "gate":
            z = z * said.sigmoid()
        elif modulate == "film":
            z = z * (1 + said[:8]) + said[8:]
        y = net.block(torch.cat((p[None], z))[None])[0]
        return y[0] if readout == "prompt" else y[1:].mean(0)

    shown = [[tokens(image) for image in shots] for shots in support]
    prompts = []
    for c in range(WAYS):
        text = net.text[1](net.text[0](texts[c] / texts[c].norm()))
        maps = torch.stack([z.T.unflatten(1, (4, 4)) for z in shown[c]])
        prompts.append(net.pyramid(text[None], maps[None])[0])
    prototypes = [torch.stack([feature(z, prompts[c]) for z in shown[c]]).mean(0) for c in range(WAYS)]
    wanted = torch.zeros(QUERIES, WAYS).double()
    for i, image in enumerate(queries):
        for c in range(WAYS):
            p = {"none": None, "mean": torch.stack(prompts).mean(0), "all": prompts[c]}[query_prompt]
            wanted[i, c] = net.temperature * F.cosine_similarity(feature(tokens(image), p), prototypes[c], dim=0)
    torch.testing.assert_close(net(support, queries, texts), wanted)


def test_an_episode_trains_every_part_but_the_classifier_and_the_base_classes_train_no_prompt() -> None:
    net, (support, queries, texts) = make(num_classes=5), episode()
    F.cross_entropy(net(support, queries, texts), torch.tensor([0, 1, 2, 0])).backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == ["backbone.head.weight", "backbone.head.bias", "head.weight", "head.bias"]
    net.zero_grad()
    F.cross_entropy(net.classify(queries), torch.tensor([0, 1, 2, 4])).backward()
    idle = {n.split(".")[0] for n, p in net.named_parameters() if p.grad is None}
    assert idle == {"backbone", "text", "pyramid", "modulator", "temperature"}


@torch.no_grad()
def test_a_query_without_prompt_depends_on_no_name_of_its_own_and_queries_on_no_other() -> None:
    net, (support, queries, texts) = make().eval(), episode()
    logits = net(support, queries, texts)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(net(support[order], queries, texts[order]), logits[:, order])
    torch.testing.assert_close(net(support, queries[1:2], texts), logits[1:2])
    texts[0] += 1
    moved = net(support, queries, texts) != logits
    assert moved[:, 0].all() and not moved[:, 1:].any()


@torch.no_grad()
def test_replacing_keeps_the_weights_and_with_all_keys_the_backbone() -> None:
    torch.manual_seed(0)
    backbone, images = ViT(**{**TINY, "class_token": True, "num_classes": 2}).eval(), torch.randn(2, 3, 16, 16)
    before = backbone.forward_features(images)[-1]
    net = KTPP(backbone, heads=2, keep=(1.0, 1.0), place="replace").eval()
    kinds = [isinstance(block.mixer, KNNContext) for block in backbone.encoder.blocks]
    assert kinds == [False, True, True] and not net.stages
    torch.testing.assert_close(net.maps(images), before)
    few = KTPP(ViT(**{**TINY, "class_token": True, "num_classes": 2}), heads=2, keep=(2, 1), place="replace")
    assert [block.mixer.keep for block in few.backbone.encoder.blocks[1:]] == [2, 1]


def test_stands_on_timms_visformer_as_few_shot_papers_do(timm) -> None:
    backbone = timm.create_model("visformer_tiny", num_classes=0).eval()
    net = KTPP(backbone, dim=384, heads=6, scales=(1, 2)).eval()
    with torch.no_grad():
        logits = net(torch.randn(2, 1, 3, 224, 224), torch.randn(1, 3, 224, 224), torch.randn(2, 512))
    assert logits.shape == (1, 2) and logits.abs().max() <= 10


def test_episodes_are_disjoint_and_of_their_classes() -> None:
    labels = torch.arange(7).repeat_interleave(6)
    labels = torch.cat((labels, torch.tensor([7, 7])))  # too few of the last
    for seed in range(5):
        task = draw_episode(labels, ways=4, shots=2, queries=3, generator=torch.Generator().manual_seed(seed))
        assert len(task.classes.unique()) == 4 and 7 not in task.classes
        rows = torch.cat((task.support, task.queries), 1)
        assert len(rows.unique()) == rows.numel() == 4 * 5
        assert torch.equal(labels[rows], task.classes[:, None].expand(-1, 5))
    again = [draw_episode(labels, ways=4, queries=3, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(again[0].queries, again[1].queries)


def test_accuracy_over_episodes_has_an_interval() -> None:
    class Told(KTPP):
        """Right about half of the queries."""

        def forward(self, support: Tensor, queries: Tensor, texts: Tensor) -> Tensor:
            return F.one_hot(torch.arange(2).repeat_interleave(2) * torch.tensor([1, 1, 0, 1]), 2).double()

    net = Told(ViT(**TINY), heads=2)
    labels = torch.arange(2).repeat_interleave(4)
    found = few_shot_accuracy(
        net, torch.zeros(8, 3, 16, 16), labels, torch.zeros(2, 512), ways=2, queries=2, episodes=3
    )
    assert found == (0.75, 0.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make(place="first"), ValueError, "place must be one of"),
        (lambda: make(modulate="add"), ValueError, "modulate must be one of"),
        (lambda: make(query_prompt="own"), ValueError, "query_prompt must be one of"),
        (lambda: make(readout="max"), ValueError, "readout must be one of"),
        (lambda: make(readout="prompt"), ValueError, "readout='prompt' needs query_prompt"),
        (lambda: make(keep=()), ValueError, "keep must hold the share"),
        (lambda: make(scales=(2, 1)), ValueError, "from coarse to fine"),
        (lambda: make(keep=(1.0,) * 4, place="replace"), ValueError, "keep must be at most 3 stages"),
        (lambda: KTPP(nn.Linear(2, 2)), TypeError, "backbone must have forward_features"),
        (lambda: make().classify(torch.zeros(1, 3, 16, 16).double()), ValueError, "classify needs num_classes"),
        (lambda: make()(episode()[0], episode()[1], torch.zeros(2, 6).double()), ValueError, "each of the 3 classes"),
        (lambda: make()(episode()[1], episode()[1], episode()[2]), ValueError, "support must be"),
        (lambda: draw_episode(torch.zeros(9), ways=2), ValueError, "labels must hold 2 classes of 16 images, got 0"),
        (lambda: draw_episode(torch.zeros(9), shots=0), ValueError, "must be at least 1"),
    ],
)
def test_errors_name_what_is_wrong(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
