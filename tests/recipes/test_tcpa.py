"""Prompts that tokens pick for themselves: the masked softmax, what each kind of token sees, and what is trained."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnlab
from attnlab.models.skeletons.plain import Plain
from attnlab.nn.multihead import MultiHead
from attnlab.recipes.tcpa import TCPA, ImagePrompter, PromptPool, coordinated_attention, fourier, simam
from attnlab.recipes.vpt import VisualPrompts


def vit() -> Plain:
    return attnlab.build("vit", dim=16, depth=2, heads=2, image=16, patch=4, num_classes=5)


def tcpa(**settings) -> TCPA:
    return TCPA(vit(), **{"sizes": (4, 5), "picks": (2, 3), "lengths": (2, 1), "dropout": 0.0, **settings})


def by_the_paper(mixer: MultiHead, x: Tensor, prompts: Tensor, hidden: Tensor) -> Tensor:
    """The whole matrix of weights, the prompts' own rows too, then the mask on what the softmax gave."""
    both = torch.cat((x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]), 1)
    q, k, v = mixer.project(both)
    a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    count = prompts.shape[1]
    a = torch.cat((a[:, :, :1], a[:, :, 1 + count :]), 2)
    mask = torch.ones(len(x), x.shape[1], both.shape[1], dtype=x.dtype)
    mask[:, :, 1 : 1 + count] = (~hidden).to(x)
    return mixer.merge((a * mask[:, None]) @ v)


def heads_and_prompts() -> tuple[MultiHead, Tensor, Tensor, Tensor]:
    mixer = MultiHead(16, heads=2, bias=True).double()
    x, prompts = torch.randn(3, 9, 16, dtype=torch.float64), torch.randn(1, 5, 16, dtype=torch.float64)
    return mixer, x, prompts, torch.rand(3, 9, 5) < 0.5


def test_equals_the_masked_matrix_of_weights_and_its_gradients() -> None:
    mixer, x, prompts, hidden = heads_and_prompts()
    leaves = [x.requires_grad_(), prompts.requires_grad_(), *mixer.parameters()]
    ours, theirs = coordinated_attention(mixer, x, prompts, hidden), by_the_paper(mixer, x, prompts, hidden)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), leaves) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_without_prompts_it_is_plain_attention() -> None:
    mixer, x, prompts, hidden = heads_and_prompts()
    torch.testing.assert_close(coordinated_attention(mixer, x, prompts[:, :0], hidden[..., :0]), mixer(x))


def test_a_hidden_prompt_gives_no_value_but_takes_its_share_of_the_softmax() -> None:
    mixer, x, prompts, hidden = heads_and_prompts()
    hidden[:, 0], hidden[:, 1:] = torch.tensor([False, False, True, True, True]), True
    found = coordinated_attention(mixer, x, prompts, hidden)
    # Other values for what the class token does not see: its row is as it was.
    affine = torch.stack((torch.ones(5, 16), torch.zeros(5, 16))).double()
    affine[:, 2:] = 3.0
    torch.testing.assert_close(coordinated_attention(mixer, x, prompts, hidden, affine)[:, 0], found[:, 0])
    moved = prompts.clone()
    moved[:, 2:] += 1.0
    assert not torch.allclose(coordinated_attention(mixer, x, moved, hidden)[:, 0], found[:, 0])


def test_each_token_sees_its_picks_of_its_own_kind() -> None:
    net, x = tcpa(), torch.randn(3, 17, 16)
    hidden, distance = net.hidden(1, x)
    assert torch.equal((~hidden).sum(-1)[:, 0], torch.full((3,), 2 * 2))
    assert torch.equal((~hidden).sum(-1)[:, 1:], torch.full((3, 16), 3 * 1))
    assert hidden[:, 0, 8:].all() and hidden[:, 1:, :8].all()
    assert torch.equal(hidden[:, 0, 0:8:2], hidden[:, 0, 1:8:2])  # both prompts of an entry
    likeness = F.cosine_similarity(x[:, :, None], net.patch_pool.keys[1], dim=-1)
    assert torch.equal(~hidden[:, 1:, 8:], likeness[:, 1:] >= likeness[:, 1:].topk(3).values[..., -1:])
    one = F.cosine_similarity(x[:, :1, None], net.class_pool.keys[1], dim=-1).topk(2).values
    torch.testing.assert_close(distance, (1 - one).mean() + (1 - likeness[:, 1:].topk(3).values).mean())
    everything, nothing = tcpa(matched=False).hidden(0, x)
    assert torch.equal((~everything).sum(-1)[0], torch.tensor([8] + [5] * 16)) and nothing == 0


def test_random_picks_keep_their_number() -> None:
    net, x = tcpa(), torch.randn(3, 17, 16)
    first, second = (net.hidden(0, x, random=True).chosen for _ in range(2))
    assert torch.equal(first.sum(-1), second.sum(-1)) and not torch.equal(first, second)


def test_the_distance_trains_keys_and_the_classes_train_prompts() -> None:
    net, images = tcpa(affine=True).train(), torch.randn(2, 3, 16, 16)
    assert not net.backbone.training
    logits, distance = net(images)
    pools = (net.class_pool, net.patch_pool)
    keys, prompts = ([getattr(p, name) for p in pools] for name in ("keys", "prompts"))
    grads = torch.autograd.grad(
        logits.pow(2).sum(), [*keys, *prompts, net.affine], allow_unused=True, retain_graph=True
    )
    assert grads[0] is None and grads[1] is None and all(g.any() for g in grads[2:])
    # The first layer's input hangs on no prompt, so that its picks' distance moves keys alone.
    _, first = net.hidden(0, net.backbone.embed(images)[0])
    grads = torch.autograd.grad(first, [*keys, *prompts], allow_unused=True)
    assert grads[0].any() and grads[1].any() and grads[2] is None and grads[3] is None
    (logits.pow(2).sum() + distance).backward()
    assert {n for n, p in net.backbone.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}


def test_picking_everything_hangs_on_every_prompt_of_ones_kind() -> None:
    net = tcpa(sizes=(3, 3), picks=(3, 3), lengths=(1, 1), with_fourier=False)
    x = torch.randn(1, 17, 16)
    hidden, _ = net.hidden(0, x)
    prompts = net.prompts(0).detach().requires_grad_()
    mixer = net.backbone.encoder.blocks[0].mixer
    out = coordinated_attention(mixer, x, prompts, hidden)
    for row in (out[:, 0], out[:, 5]):
        (gradient,) = torch.autograd.grad(row.sum(), prompts, retain_graph=True)
        assert (gradient[0].abs().sum(-1) > 0).all()


def test_dropout_differs_between_images_and_fourier_is_the_real_part() -> None:
    net = tcpa(dropout=0.5, with_fourier=False).train()
    prompts = net.prompts(0, 2)
    assert prompts.shape == (2, 13, 16) and not torch.equal(prompts[0], prompts[1])
    p = torch.randn(1, 3, 4, dtype=torch.float64)
    wanted = torch.zeros(1, 3, 4, dtype=torch.float64)
    for a in range(3):
        for b in range(4):
            for i in range(3):
                for j in range(4):
                    wanted[0, a, b] += p[0, i, j] * torch.cos(2 * torch.pi * torch.tensor(a * i / 3 + b * j / 4))
    torch.testing.assert_close(fourier(p), wanted, rtol=1e-6, atol=1e-6)


def test_parameters_are_the_papers() -> None:
    with torch.device("meta"):
        net = TCPA(attnlab.build("vit_base_patch16_224", num_classes=10))
    trained = sum(p.numel() for n, p in net.named_parameters() if p.requires_grad and "head" not in n)
    assert trained == 663_552


def test_shared_prompts_are_tokens_of_every_layer() -> None:
    net, images = VisualPrompts(vit(), length=3).train(), torch.randn(2, 3, 16, 16)
    x, _ = net.backbone.embed(images)
    for block, prompts in zip(net.backbone.encoder.blocks, net.prompts, strict=True):
        x = block(torch.cat((x[:, :1], prompts.expand(2, -1, -1), x[:, 1:]), 1))
        x = torch.cat((x[:, :1], x[:, 4:]), 1)
    torch.testing.assert_close(net(images), net.backbone.head(net.backbone.encoder.norm(x)[:, 0]))
    net(images).sum().backward()
    assert net.prompts.grad.any() and net.backbone.patches.weight.grad is None
    assert VisualPrompts(vit(), length=3, deep=False)(images).shape == (2, 5)


def test_options_on_the_image() -> None:
    images = torch.randn(2, 3, 12, 12)
    assert ImagePrompter()(images).shape == images.shape
    flat = simam(torch.ones(1, 2, 4, 4))
    torch.testing.assert_close(flat, torch.full_like(flat, torch.tensor(0.5).sigmoid().item()))


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="picks"):
        PromptPool(8, 2, size=3, picks=4)
    with pytest.raises(TypeError, match="backbone"):
        TCPA(attnlab.build("vit", dim=16, depth=1, heads=2, image=16, patch=4, class_token=False))
    with pytest.raises(ValueError, match="length"):
        VisualPrompts(vit(), length=0)


@pytest.mark.slow
def test_patches_differ_more_with_prompts_of_their_own_than_with_shared_ones() -> None:
    """The paper's claim on features, at one number of parameters; its gain in accuracy needs more than digits."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
    labels = torch.tensor(data.target)
    known, new = labels < 5, labels >= 5

    def fit(net: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, rate: float) -> None:
        optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], rate)
        for step in range(steps):
            part = torch.randint(0, len(x), (48,))
            out = net(x[part], random=step < steps // 10) if isinstance(net, TCPA) else net(x[part])
            logits, distance = out if isinstance(out, tuple) else (out, 0.0)
            optimiser.zero_grad()
            (F.cross_entropy(logits, y[part]) + 0.01 * distance).backward()
            optimiser.step()
        net.eval()

    vit = attnlab.build("vit", dim=32, depth=3, heads=4, image=8, patch=2, num_classes=5)
    fit(vit, images[known], labels[known], 120, 3e-3)
    alike = []
    for build in (
        lambda frozen: VisualPrompts(frozen, length=24),
        lambda frozen: TCPA(frozen, sizes=(6, 6), picks=(3, 3), with_fourier=False),
    ):
        torch.manual_seed(0)
        net = build(copy.deepcopy(vit))
        fit(net, images[new][:500], labels[new][:500] - 5, 60, 5e-3)
        with torch.no_grad():
            out = net.tokens(images[new][500:])
        unit = F.normalize((out[0] if isinstance(out, tuple) else out)[:, 1:], dim=-1)
        alike.append((unit @ unit.mT).mean().item())
    assert alike[1] < alike[0]
