"""Token coordinated prompts: the picks, the mask after the softmax, what is trained, and prompts that all share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnlab
from attnlab.models.skeletons.plain import Plain
from attnlab.models.vision.vit import ViT
from attnlab.recipes.tcpa import TCPA, PromptPool, attend_prompts, simam

TINY = {"dim": 8, "depth": 2, "heads": 2, "image": 8, "patch": 4, "num_classes": 3}


def make(depth: int = 2, **keywords) -> TCPA:
    torch.manual_seed(0)
    backbone = ViT(**{**TINY, "depth": depth})
    for p in backbone.parameters():
        nn.init.normal_(p, std=0.4)
    options = {"size": (4, 5), "length": (2, 1), "keep": (2, 3), "dropout": 0.0, **keywords}
    return TCPA(backbone, **options).double()


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64)


def naive(net: TCPA, x: Tensor) -> tuple[Tensor, Tensor]:
    """The network token by token and prompt by prompt."""
    total = torch.zeros((), dtype=torch.float64)
    stream = net.backbone.embed(x)[0]
    for layer, block in enumerate(net.backbone.encoder.blocks):
        mixer = block.mixer
        prompts = torch.cat([p.prompts[layer].flatten(0, 1) for p in (net.class_pool, net.patch_pool)])
        if net.fourier:
            prompts = torch.fft.fft(torch.fft.fft(prompts, dim=-1), dim=-2).real
        said = torch.zeros_like(stream)
        apart: dict[PromptPool, list[Tensor]] = {net.class_pool: [], net.patch_pool: []}
        for b in range(len(stream)):
            sequence = block.norm1(torch.cat((stream[b, :1], prompts, stream[b, 1:])))
            q, k, v = mixer.wqkv(sequence).view(len(sequence), 3, 2, 4).permute(1, 2, 0, 3)
            weights = (q @ k.mT / 2).softmax(-1)
            for i in range(stream.shape[1]):
                pool, begin = (net.patch_pool, 1 + 4 * 2) if i else (net.class_pool, 1)
                cosine = F.cosine_similarity(stream[b, i], pool.keys[layer], dim=-1)
                mask = torch.ones(len(sequence), dtype=torch.float64)
                mask[1 : 1 + len(prompts)] = 0
                for s in cosine.argsort(descending=True)[: pool.keep].tolist():
                    mask[begin + s * pool.length : begin + (s + 1) * pool.length] = 1
                    apart[pool].append(1 - cosine[s])
                at = i + len(prompts) if i else 0
                said[b, i] = mixer.wo(((weights[:, at] * mask)[:, None] @ v).flatten())
        total = total + sum(torch.stack(d).mean() for d in apart.values())
        stream = block.feed(stream + said)
    return net.backbone.head(net.backbone.encoder.norm(stream)[:, 0]), total


@pytest.mark.parametrize("fourier", [True, False])
@torch.no_grad()
def test_equals_the_equations_token_by_token(fourier: bool) -> None:
    net, x = make(fourier=fourier).eval(), images()
    out = net.run(x)
    logits, distance = naive(net, x)
    torch.testing.assert_close(out.logits, logits)
    torch.testing.assert_close(out.distance, distance)
    torch.testing.assert_close(net(x), logits)


@torch.no_grad()
def test_each_token_sees_as_many_prompts_of_its_own_kind_as_it_picks() -> None:
    net = make()
    x = torch.randn(3, 5, 8).double()
    seen, _ = net.match(x, 0)
    assert seen[:, 0, 8:].sum() == 0 and (seen[:, 0, :8].sum(-1) == 2 * 2).all()
    assert seen[:, 1:, :8].sum() == 0 and (seen[:, 1:, 8:].sum(-1) == 3).all()
    picked = seen[:, 0, :8].view(3, 4, 2)
    assert torch.equal(picked[..., 0], picked[..., 1])  # an entry's prompts come together
    everything, _ = make(keep=(4, 5)).match(x, 0)
    roles, distance = make(select="role").match(x, 0)
    assert torch.equal(everything, roles) and distance == 0


@torch.no_grad()
def test_hidden_prompts_say_nothing_but_keep_their_share_of_the_softmax() -> None:
    net = make(depth=1).eval()
    x = torch.randn(2, 5, 8).double()
    seen, _ = net.match(x, 0)
    q, k, v = net.backbone.encoder.blocks[0].mixer.project(x)
    pk, pv = torch.randn(2, 1, 2, 13, 4).double()
    y = attend_prompts(q, k, v, pk, pv, seen)
    pv[:, :, 8:] += 1
    assert torch.equal(attend_prompts(q, k, v, pk, pv, seen)[:, :, 0], y[:, :, 0])  # not the patches' values
    pk[:, :, 8:] += 1
    moved = attend_prompts(q, k, v, pk, pv, seen)[:, :, 0]
    assert not torch.allclose(moved, y[:, :, 0])  # but their scores
    ones = attend_prompts(q, k, torch.ones_like(v), pk, torch.ones_like(pv), seen)
    assert (ones < 1).all()


@torch.no_grad()
def test_without_prompts_it_is_the_backbone() -> None:
    net, x = make(size=0, length=1, keep=0).eval(), images()
    torch.testing.assert_close(net(x), net.backbone(x))
    assert net.run(x).distance == 0


@torch.no_grad()
def test_shared_prompts_are_those_that_a_block_over_tokens_and_prompts_sees() -> None:
    net, x = make(select="all").eval(), images()
    stream = net.backbone.embed(x)[0]
    for layer, block in enumerate(net.backbone.encoder.blocks):
        prompts = net.prompts(layer, 3).expand(3, -1, -1)
        stream = block(torch.cat((stream, prompts), 1))[:, :5]  # the next layer's replace them
    torch.testing.assert_close(net.run(x).tokens, net.backbone.encoder.norm(stream))


def test_distance_trains_keys_and_cross_entropy_prompts_and_the_backbone_stays() -> None:
    net, x = make(depth=1), images()
    out = net.run(x)
    names = [n for n, p in net.named_parameters() if p.requires_grad]
    found = {}
    for term in (out.distance, F.cross_entropy(out.logits, torch.tensor([0, 1, 2]))):
        gradients = torch.autograd.grad(
            term, [net.get_parameter(n) for n in names], allow_unused=True, retain_graph=True
        )
        found[term] = [n for n, g in zip(names, gradients, strict=True) if g is not None and g.any()]
    near, task = found.values()
    assert near == ["class_pool.keys", "patch_pool.keys"]
    assert sorted(task) == ["backbone.head.bias", "backbone.head.weight", "class_pool.prompts", "patch_pool.prompts"]


def test_training_mode_drops_prompts_and_leaves_the_backbone_as_it_is() -> None:
    net = make(dropout=0.5)
    assert net.training and not net.backbone.training and net.dropout.training
    assert net.prompts(0, 3).shape == (3, 13, 8) and net.eval().prompts(0, 3).shape == (1, 13, 8)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert trained == 2 * (4 * 8 + 4 * 2 * 8 + 5 * 8 + 5 * 8) + 8 * 3 + 3


def test_warming_up_picks_at_random_and_still_measures_the_distance() -> None:
    net, x = make(depth=1), images(1)
    seeds = [torch.Generator().manual_seed(s) for s in (0, 0, 1)]
    runs = [net.run(x, random=True, generator=g) for g in seeds]
    torch.testing.assert_close(runs[0].logits, runs[1].logits)
    assert not torch.allclose(runs[0].logits, runs[2].logits)
    assert runs[0].distance > net.run(x).distance  # the nearest are nearer


def test_counts_the_papers_parameters() -> None:
    with torch.device("meta"):
        net = TCPA(attnlab.build("vit_base_patch16_224", num_classes=10))
    trained = {n: p.numel() for n, p in net.named_parameters() if p.requires_grad}
    head = 768 * 10 + 10
    assert sum(trained.values()) == 663_552 + head


def test_optional_parts_are_trained_too() -> None:
    net, x = make(value_affine=True, image_prompt=True, sharpen=True), images()
    out = net.run(x)
    net.loss(out, torch.tensor([0, 1, 2])).backward()
    parts = ("value_scale", "value_shift", "prompter.0.weight", "prompter.1.weight", "prompter.2.bias")
    assert all(net.get_parameter(n).grad.any() for n in parts)
    seen, _ = net.match(net.backbone.embed(x)[0], 0)
    y = net.attention(net.backbone.embed(x)[0], 0, seen)
    with torch.no_grad():
        net.value_scale.fill_(1)
        net.value_shift.fill_(0)
    plain = make()
    torch.testing.assert_close(net.attention(x0 := net.backbone.embed(x)[0], 0, seen), plain.attention(x0, 0, seen))
    assert not torch.allclose(y, net.attention(x0, 0, seen))
    flat = torch.ones(1, 3, 4, 4)
    torch.testing.assert_close(simam(flat), flat * torch.tensor(0.5).sigmoid())


def test_reads_the_authors_names() -> None:
    from attnlab.hub.official.tcpa import TunedTransformer

    torch.manual_seed(0)
    net = make(size=4, length=1, keep=2)
    net.backbone = ViT(dim=8, depth=2, heads=2, image=8, patch=4, num_classes=3).double()
    blocks = (
        (".mixer.wqkv", ".attn.qkv"),
        (".mixer.wo", ".attn.proj"),
        ("encoder.", ""),
        ("patches", "patch_embed.proj"),
    )
    theirs = {}
    for name, p in net.state_dict().items():
        name = name.replace("class_pool", "Pool.Pool_cls").replace("patch_pool", "Pool.Pool_image")
        for ours, their in blocks:
            name = name.replace(ours, their)
        name = name.replace("class_token", "cls_token").replace("positions.table", "pos_embed")
        theirs[name] = p[None] if name.endswith("pos_embed") else p[None, None] if name.endswith("cls_token") else p
    arguments = {"topk_cls": 2, "topk_image": 2, "num_heads": 2}
    again = TunedTransformer.build(arguments, theirs).double().eval()
    x = images()
    torch.testing.assert_close(TunedTransformer.run(again, {"x": x})["logits"], net.eval()(x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make(size=-1), ValueError, "size must be at least 0"),
        (lambda: make(keep=(5, 1)), ValueError, r"keep must be from 1 to size = \(4, 5\)"),
        (lambda: make(keep=0), ValueError, "keep must be from 1"),
        (lambda: make(select="some"), ValueError, "select must be 'token', 'role' or 'all'"),
        (lambda: TCPA(nn.Linear(2, 2)), TypeError, "backbone must be a Plain network with a class token"),
        (lambda: TCPA(Plain(dim=8, depth=1, mixer="linear", image=8, patch=4)), TypeError, "must mix by MultiHead"),
        (lambda: TCPA(ViT(**{**TINY, "num_classes": 0})), ValueError, "backbone must have a classifier"),
        (lambda: make()(torch.zeros(1, 3, 7, 8).double()), ValueError, "x must be images"),
    ],
)
def test_errors_name_what_is_wrong(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
