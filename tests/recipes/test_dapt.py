"""Prompts of both towers, and losses that take fore- and background apart: what is trained, what is detached."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.models.vision.clip import CLIP
from attnlab.recipes.dapt import BACKGROUNDS, DAPT, FOOD_BACKGROUNDS, grad_cam, random_cells
from attnlab.recipes.maple import MaPLe

TINY = dict(
    dim=32, depth=3, heads=2, image=16, patch=4, text_dim=24, text_depth=3, text_heads=2, words=50, length=9, out_dim=20
)


class Towers(nn.Module):
    """Stand-ins: pixels through a matrix, a table of texts."""

    def __init__(self, texts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(6, 48))
        self.table = nn.Parameter(torch.randn(texts, 6))
        self.logit_scale = torch.tensor(1.0)

    def image(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T

    def text(self) -> Tensor:
        return self.table


def case(variant: str = "paper") -> tuple[DAPT, tuple[Tensor, Tensor, Tensor]]:
    masks = (torch.rand(3, 4, 4) < 0.5).float()
    return DAPT(Towers(8), 3, variant=variant, backgrounds=4), (torch.randn(3, 3, 4, 4), masks, torch.arange(3))


def test_the_terms_are_those_of_the_paper_and_switch_with_the_epoch() -> None:
    dapt, (images, masks, labels) = case()
    early, late = dapt.terms(images, masks, labels, 6), dapt.terms(images, masks, labels, 7)
    whole, front = (F.normalize(dapt.towers.image(i), dim=1) for i in (images, images * masks[:, None]))
    behind = F.normalize(dapt.towers.image(images * (1 - masks[:, None])), dim=1)
    texts = F.normalize(dapt.towers.table, dim=1)
    scale = torch.tensor(1.0).exp()
    own = F.cross_entropy(scale * whole @ texts[:3].T, labels)
    pull = ((whole - front).norm(dim=1) - (whole - behind).norm(dim=1) + 1.5).clamp(min=0).mean()
    torch.testing.assert_close(early.loss, own + 0.8 * pull, rtol=1e-4, atol=1e-5)
    foreground = F.cross_entropy(scale * front @ texts[:3].T, labels)
    seen = scale * behind @ texts[3:].T
    background = F.cross_entropy(seen, seen.argmax(1))
    torch.testing.assert_close(late.loss, own + 0.1 * foreground + 0.5 * background)


def test_the_release_counts_the_first_backgrounds_as_classes() -> None:
    dapt, batch = case("release")
    assert dapt.terms(*batch, 0).logits.shape == (3, 4)  # 8 texts less the last 4, of which 3 are classes
    assert dapt(batch[0]).shape == (3, 3)
    assert len(BACKGROUNDS) == 25 and len(FOOD_BACKGROUNDS) == 7


def test_nothing_flows_where_it_is_detached() -> None:
    dapt, (images, masks, labels) = case()
    towers = dapt.towers
    found = dapt.terms(images, masks, labels, 0)
    weight, table = torch.autograd.grad(
        found.foreground, (towers.weight, towers.table), allow_unused=True, retain_graph=True
    )
    assert (weight is None or not weight.any()) and table.any()
    weight, table = torch.autograd.grad(found.pull, (towers.weight, towers.table), allow_unused=True, retain_graph=True)
    assert weight.any() and table is None
    (weight,) = torch.autograd.grad(found.background, towers.weight)
    assert weight.any()


def test_a_mask_of_ones_is_the_whole_image_and_inference_needs_none() -> None:
    dapt, (images, _, labels) = case()
    found = dapt.terms(images, torch.ones(3, 4, 4), labels, 0)
    torch.testing.assert_close(found.foreground, F.cross_entropy(found.logits, labels))
    torch.testing.assert_close(dapt(images), found.logits)


def test_self_labelling_falls_under_its_own_gradient() -> None:
    dapt, batch = case()
    optimiser, losses = torch.optim.SGD(dapt.parameters(), lr=0.3), []
    for _ in range(20):
        optimiser.zero_grad()
        loss = dapt.terms(*batch, 9).background
        losses.append(loss.item())
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0] and min(losses) >= 0


def prompted(fixed: bool = True, **settings) -> MaPLe:
    return MaPLe(
        CLIP(**TINY), torch.randint(2, 40, (3, 9)), fixed=torch.randint(2, 40, (4, 9)) if fixed else None, **settings
    )


def test_prompts_alone_are_trained_and_reach_both_towers() -> None:
    maple = prompted(layers=2).train()
    assert not maple.clip.training
    dapt = DAPT(maple, 3)
    images, labels = torch.randn(3, 3, 16, 16), torch.arange(3)
    dapt.terms(images, random_cells(3, (16, 16), 4), labels, 8).loss.backward()
    for name, p in dapt.named_parameters():
        assert (p.grad is None) == (".clip." in name), name
    assert all(p.grad.any() for p in maple.parameters() if p.requires_grad)
    assert dapt(images).shape == (3, 3)


def test_parameters_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        maple = MaPLe(CLIP(), torch.zeros(3, 77, dtype=torch.long))
    assert sum(p.numel() for p in maple.parameters() if p.requires_grad) == 9 * (512 * 768 + 768) + 9 * 2 * 512


def test_prompts_that_start_as_the_text_change_no_text_and_fixed_ones_keep_their_words() -> None:
    maple = prompted(layers=1, start=torch.tensor([7, 9]))
    maple.ids[:, 1:3] = torch.tensor([7, 9])
    torch.testing.assert_close(maple.text(), maple.clip.text(torch.cat((maple.ids, maple.fixed))))
    before = maple.text()[3:]
    maple.prompts[0].data.add_(1.0)
    torch.testing.assert_close(maple.text()[3:], before)


def test_grad_cam_is_the_gradient_at_the_last_blocks_norm() -> None:
    dapt, images, labels = DAPT(prompted(layers=2), 3), torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    tower = dapt.towers.clip.image
    cam = grad_cam(dapt, tower, images, labels)
    assert cam.shape == (2, 16, 16) and cam.min() >= 0 and cam.max() <= 1
    assert all(p.grad is None for p in dapt.parameters())
    # The same from the block's input on, by hand.
    with torch.no_grad():
        x = tower.embed(images)[0]
        prompts = [to(p) for to, p in zip(dapt.towers.to_image, dapt.towers.prompts, strict=True)]
        x = torch.cat((x, tower.norm_pre(prompts[0]).expand(2, -1, -1)), 1)
        x = tower.encoder.blocks[0](x)
        x = torch.cat((x[:, :-2], prompts[1].expand(2, -1, -1)), 1)
        x = tower.encoder.blocks[1](x)
    last = tower.encoder.blocks[2]
    seen = last.norm1(x).detach().requires_grad_()
    feature = F.normalize(tower.head(tower.encoder.norm(last.after(x, last.mixer(seen))[:, 0])), dim=1)
    texts = F.normalize(dapt.towers.text()[:3], dim=1)
    score = (dapt.towers.logit_scale.exp() * feature @ texts.T)[torch.arange(2), labels].sum()
    (gradient,) = torch.autograd.grad(score, seen)
    wanted = (gradient[:, 1:17].mean(1, keepdim=True) * seen[:, 1:17]).sum(-1).relu()
    wanted = (wanted / wanted.amax(1, keepdim=True)).view(2, 1, 4, 4)
    torch.testing.assert_close(cam, F.interpolate(wanted, size=16, mode="bilinear")[:, 0], rtol=1e-4, atol=1e-4)


def test_random_cells_are_whole_and_alike() -> None:
    masks = random_cells(2, (30, 27), 4, generator=torch.Generator().manual_seed(3))
    assert masks.shape == (2, 30, 27) and torch.equal(masks[0], masks[1])
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(masks[0, :4, :4], masks[0, :1, :1].expand(4, 4))


def test_what_does_not_fit_is_named() -> None:
    dapt, (images, masks, labels) = case()
    with pytest.raises(ValueError, match="masks"):
        dapt.terms(images, masks[:2], labels, 0)
    with pytest.raises(ValueError, match="variant"):
        DAPT(Towers(8), 3, variant="other")
    with pytest.raises(ValueError, match="towers"):
        DAPT(Towers(3), 3).terms(images, masks, labels, 0)
    with pytest.raises(ValueError, match="layers"):
        prompted(layers=4)
    with pytest.raises(ValueError, match="keep"):
        random_cells(1, (4, 4), 2, keep=1.0)


def scenes(count: int, paired: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 1, 16, 16): a shape (the class) on a texture, which goes with the class where `paired`; the masks."""
    labels = torch.randint(0, 2, (count,))
    texture = labels if paired else torch.randint(0, 2, (count,))
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    images = torch.where(texture[:, None, None] == 1, (rows % 2 * 2 - 1), (columns % 2 * 2 - 1)).float()
    masks = torch.zeros(count, 16, 16)
    for i in range(count):
        top, left = torch.randint(0, 8, (2,)).tolist()
        masks[i, top : top + 8, left : left + 8] = 1
        inside = torch.zeros(8, 8)
        if labels[i]:
            inside[3:5] = inside[:, 3:5] = 2.0  # a cross
        else:
            inside[:2] = inside[-2:] = inside[:, :2] = inside[:, -2:] = 2.0  # a ring
        images[i, top : top + 8, left : left + 8] = inside
    return images[:, None] + 0.3 * torch.randn(count, 1, 16, 16), labels, masks


class Learner(nn.Module):
    """A small pair of towers trained from nothing: convolutions, and a table of two classes and two backgrounds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, 16),
        )  # fmt: skip
        self.table = nn.Parameter(torch.randn(4, 16))
        self.logit_scale = torch.tensor(2.0)

    def image(self, images: Tensor) -> Tensor:
        return self.net(images)

    def text(self) -> Tensor:
        return self.table


def test_what_is_pulled_to_the_foreground_does_not_fall_for_another_background() -> None:
    images, labels, masks = scenes(256, paired=True)
    new, wanted, _ = scenes(512, paired=False)
    found = []
    for pull in (0.0, 0.8):
        torch.manual_seed(2)
        dapt = DAPT(Learner(), 2, pull=pull)
        optimiser = torch.optim.Adam(dapt.parameters(), lr=3e-3)
        for _ in range(25):
            for part in torch.randperm(256).split(32):
                optimiser.zero_grad()
                dapt.terms(images[part], masks[part], labels[part], 0).loss.backward()
                optimiser.step()
        found.append((dapt(new).argmax(1) == wanted).float().mean().item())
    assert found[1] > found[0] + 0.1, found
