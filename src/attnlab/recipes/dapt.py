"""Decouple before align: prompts that learn the foreground, and are pushed off the background (DAPT)."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import RECIPE, Card, register
from attnlab.models.skeletons.plain import Plain

# What a background may show, in "a clean origami {}."; the second list where the classes are food.
BACKGROUNDS = (
    "ground land grass tree building wall sky lake water river sea railway railroad keyboard helmet cloud house "
    "mountain ocean road rock street valley bridge sign"
).split()
FOOD_BACKGROUNDS = "table forks tablecloth hands spoon glasses dishes".split()


class TwoTowers(Protocol):
    """A prompted pair of encoders, such as `recipes.maple.MaPLe`."""

    @property
    def logit_scale(self) -> Tensor: ...

    def image(self, images: Tensor) -> Tensor: ...

    def text(self) -> Tensor: ...


class Terms(NamedTuple):
    """The loss and what it is made of; which terms count depends on the epoch."""

    loss: Tensor
    logits: Tensor  # (B, K), or all foreground texts' in the release's split
    pull: Tensor  # to the foreground, away from the background
    foreground: Tensor
    background: Tensor


@register(
    Card(
        name="dapt",
        title="Decouple before Align: Visual Disentanglement Enhances Prompt Tuning",
        paper="2508.00395",
        system="dapt",
        family="prompting",
        kind=RECIPE,
        cost="N², three times in training",
    )
)
class DAPT(nn.Module):
    """Teaches prompts with the image's foreground and background apart; costs nothing at inference.

        f, f⁺, f⁻ = image(I), image(I ∘ m), image(I ∘ (1 − m)),  T = text(), all of length 1,  s = exp(logit_scale)
        epoch ≤ switch:  CE(s f T_fgᵀ, y) + 0.8 · triplet(f, f⁺, f⁻; margin 1.5)        f⁺ and f⁻ give no gradient
        later:           CE(s f T_fgᵀ, y) + 0.1 · CE(s f⁺ T_fgᵀ, y) + 0.5 · CE(s f⁻ T_bgᵀ, argmax f⁻ T_bgᵀ)
                         of which f⁺ gives no gradient to the image's side

    `dapt(images)` → logits of the K classes; `dapt.terms(images, masks, labels, epoch)` → `Terms`. Masks (B, H, W) in
    [0, 1] come from a segmenter, from `grad_cam` after every epoch, or from `random_cells`.
    Source: arXiv 2508.00395; the release (Ferenas/DAPT) trains by SGD at 0.0035, 5 epochs mostly, so that its second
    phase is never reached.

    Args:
        towers: their texts are those of the K classes, then those of the background.
        classes: K.
        variant: "paper" holds the K classes against the others. In the "release" the last `backgrounds` texts are the
            background's and all before them the foreground's, so that with 32 words 7 of them stand as classes.
        switch: the last epoch, from 0, of the first phase.
    """

    def __init__(
        self,
        towers: TwoTowers,
        classes: int,
        *,
        variant: Literal["paper", "release"] = "paper",
        backgrounds: int = 25,
        switch: int = 6,
        margin: float = 1.5,
        pull: float = 0.8,
        foreground: float = 0.1,
        background: float = 0.5,
    ) -> None:
        super().__init__()
        if variant not in ("paper", "release"):
            raise ValueError(f"variant must be 'paper' or 'release', got {variant!r}")
        if classes < 1 or backgrounds < 1:
            raise ValueError(f"classes and backgrounds must be at least 1, got {classes} and {backgrounds}")
        self.towers, self.classes, self.switch, self.margin = towers, classes, switch, margin
        self.backgrounds = backgrounds if variant == "release" else None
        self.pull, self.foreground, self.background = pull, foreground, background

    def _texts(self) -> tuple[Tensor, Tensor]:
        """The foreground's and the background's texts, of length 1."""
        texts = F.normalize(self.towers.text(), dim=1)
        cut = self.classes if self.backgrounds is None else len(texts) - self.backgrounds
        if not self.classes <= cut < len(texts):
            raise ValueError(f"towers must give texts of {self.classes} classes, then backgrounds, got {len(texts)}")
        return texts[:cut], texts[cut:]

    def terms(self, images: Tensor, masks: Tensor, labels: Tensor, epoch: int) -> Terms:
        """The loss of one batch: images (B, C, H, W), masks (B, H, W), 1 on the foreground, labels (B,)."""
        if masks.shape != (len(images), *images.shape[2:]):
            raise ValueError(f"masks must be {(len(images), *images.shape[2:])}, got {tuple(masks.shape)}")
        inside = masks[:, None].to(images)
        three = torch.cat((images, images * inside, images * (1 - inside)))
        whole, front, behind = F.normalize(self.towers.image(three), dim=1).chunk(3)
        texts, others = self._texts()
        scale = self.towers.logit_scale.exp()
        logits = scale * whole @ texts.T
        pull = F.triplet_margin_loss(whole, front.detach(), behind.detach(), margin=self.margin)
        foreground = F.cross_entropy(scale * front.detach() @ texts.T, labels)
        seen = scale * behind @ others.T
        background = F.cross_entropy(seen, seen.argmax(1))
        loss = F.cross_entropy(logits, labels)
        if epoch <= self.switch:
            loss = loss + self.pull * pull
        else:
            loss = loss + self.foreground * foreground + self.background * background
        return Terms(loss, logits, pull, foreground, background)

    def forward(self, images: Tensor) -> Tensor:
        texts = F.normalize(self.towers.text()[: self.classes], dim=1)
        return self.towers.logit_scale.exp() * F.normalize(self.towers.image(images), dim=1) @ texts.T


def random_cells(
    batch: int, size: tuple[int, int], cell: int, *, keep: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """Masks (B, H, W) without a segmenter: each cell of a grid of `cell` pixels is kept or hidden by chance, alike for
    the whole batch, as in the release."""
    if not 0 < keep < 1 or cell < 1:
        raise ValueError(f"keep must be in (0, 1) and cell at least 1, got {keep} and {cell}")
    rows, columns = (-(-n // cell) for n in size)
    kept = (torch.rand(rows, columns, generator=generator) < keep).float()
    mask = kept.repeat_interleave(cell, 0).repeat_interleave(cell, 1)[: size[0], : size[1]]
    return mask.expand(batch, -1, -1)


def grad_cam(model: nn.Module, tower: Plain, images: Tensor, labels: Tensor) -> Tensor:
    """Where a class is seen: soft masks (B, H, W) in [0, 1], from the first norm of `tower`'s last block.

        A, G = the norm's output and the gradient of the label's logit there, (B, N, C) of the patches
        cam = relu(Σ_c mean_n(G)_c A_nc) / its largest, enlarged to the image

    `model(images)` gives logits (B, K) and runs `tower` once, class token first. Source: arXiv 1610.02391.
    """
    kept: list[Tensor] = []

    def hook(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor:
        kept.append(out.requires_grad_() if not out.requires_grad else out)
        return kept[-1]

    last: nn.Module = tower.encoder.blocks[-1]
    handle = last.get_submodule("norm1").register_forward_hook(hook)
    try:
        with torch.enable_grad():
            logits = model(images)
            (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), kept[0])
    finally:
        handle.remove()
    grid = tuple(n // tower.patch for n in images.shape[2:])
    first = tower.positions.prefix
    places = slice(first, first + grid[0] * grid[1])
    weight = gradient[:, places].mean(1, keepdim=True)
    cam = (weight * kept[0].detach()[:, places]).sum(-1).relu()
    cam = (cam / cam.amax(1, keepdim=True).clamp(min=1e-12)).unflatten(1, grid)
    return F.interpolate(cam[:, None], size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
