"""Token labelling: every patch has a label of its own, and patches are mixed between images (VOLO, LV-ViT)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnlab.cards import RECIPE, Card, register

Box = tuple[int, int, int, int]  # top, left, bottom, right, in tokens; the last two exclusive


@register(
    Card(
        name="token_labelling",
        title="All Tokens Matter: Token Labeling for Training Better Vision Transformers",
        paper="2104.10858",
        system="volo",
        family="loss",
        kind=RECIPE,
        cost="N",
    )
)
def token_label_loss(
    class_logits: Tensor,
    token_logits: Tensor,
    targets: Tensor,
    *,
    box: Box = (0, 0, 0, 0),
    class_weight: float = 1.0,
    dense_weight: float = 0.5,
    ground_truth: bool = False,
) -> Tensor:
    """Trains the class token and every patch against soft labels: a scalar.

        L = class_weight · CE(class_logits, λ t + (1 − λ) flip(t)) + dense_weight · CE(token_logits, token labels)
        λ = 1 − area(box) / N                        flip reverses the batch; CE(x, t) = −Σ t · log_softmax(x), averaged

    class_logits (B, C) and token_logits (B, N, C), already un-mixed by `swap_box`; targets (B, C, 2 + N): the true
    label, the image's soft label t, and the N patches' soft labels; or (B, C): one soft label for all.

    Args:
        box: what `random_box` gave to the mixing of this batch; an empty one for none.
        ground_truth: blend t with the true label y first: 0.5 t + 0.5 y where t's largest class is y's, and 0.9 t +
            0.1 y elsewhere (the authors' weights; one would expect them the other way round).

    Source: arXiv 2104.10858; sail-sg/volo, `TokenLabelCrossEntropy` and `TokenLabelGTCrossEntropy`.
    """
    batch, tokens, classes = token_logits.shape
    if targets.shape not in ((batch, classes), (batch, classes, 2 + tokens)):
        raise ValueError(
            f"targets must be {(batch, classes, 2 + tokens)} or {(batch, classes)}, got {tuple(targets.shape)}"
        )
    if targets.ndim == 2:
        label, token_labels = targets, targets.unsqueeze(1)
    else:
        label, token_labels = targets[:, :, 1], targets[:, :, 2:].transpose(1, 2)
        if ground_truth:
            truth = targets[:, :, 0]
            agree = truth.argmax(-1, keepdim=True) == label.argmax(-1, keepdim=True)
            label = torch.lerp(truth, label, torch.where(agree, 0.5, 0.9).to(label))
    share = 1 - (box[2] - box[0]) * (box[3] - box[1]) / tokens
    if share < 1:
        label = share * label + (1 - share) * label.flip(0)
    whole = -(label * class_logits.log_softmax(-1)).sum(-1).mean()
    dense = -(token_labels * token_logits.log_softmax(-1)).sum(-1).mean()
    return class_weight * whole + dense_weight * dense


def random_box(grid: tuple[int, int], *, beta: float = 1.0, generator: torch.Generator | None = None) -> Box:
    """A box over about 1 − λ of the grid, λ ~ Beta(beta, beta), clipped at its edges (CutMix, arXiv 1905.04899)."""
    if beta == 1.0:
        mix = torch.rand((), generator=generator).item()
    else:
        gammas = torch._standard_gamma(torch.full((2,), float(beta)), generator=generator)
        mix = (gammas[0] / gammas.sum()).item()
    edges = []
    for size in grid:
        half = int(size * math.sqrt(1 - mix)) // 2
        centre = int(torch.randint(size, (), generator=generator))
        edges.append((max(centre - half, 0), min(centre + half, size)))
    (top, bottom), (left, right) = edges
    return top, left, bottom, right


def swap_box(maps: Tensor, box: Box) -> Tensor:
    """`maps` (B, H, W, C) with the box's content taken from the batch in reverse order; doing it twice undoes it."""
    top, left, bottom, right = box
    mixed = maps.clone()
    mixed[:, top:bottom, left:right] = maps.flip(0)[:, top:bottom, left:right]
    return mixed
