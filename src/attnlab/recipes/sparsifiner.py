"""How a Sparsifiner learns from a dense network of its size: first what is looked at, then to do without the rest.

student = attnlab.build("sparsifiner_small"); start_from(student, teacher)
reconstruct:    sparsifiner_losses(student.outputs(images, raw=True), teach(teacher, images, weights=True), labels)
then:           sparsifiner_losses(student(images), teach(teacher, images), labels)
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.cards import RECIPE, Card, register
from attnlab.models.skeletons.plain import Plain, TokenBlock
from attnlab.models.vision.sparsifiner import Outputs, Sparsifiner
from attnlab.nn.multihead import MultiHead


class Taught(NamedTuple):
    """What a dense teacher says of a batch."""

    logits: Tensor  # (B, num_classes)
    tokens: Tensor  # (B, N − 1, C): its patches, through the last norm
    weights: Tensor | None  # (L, B, H, N, N): its attention


class Losses(NamedTuple):
    """The weighted sum, and its parts as they are."""

    total: Tensor
    labels: Tensor
    logits: Tensor
    tokens: Tensor
    approximation: Tensor | None


def start_from(student: Sparsifiner, teacher: Plain) -> None:
    """Give the student the teacher's weights, in place; only its predictors stay as they were."""
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    missing = [name for name in missing if ".predictor." not in name]
    if missing or unexpected:
        raise ValueError(f"teacher must be a plain network with the student's names, got {missing + unexpected}")


@torch.no_grad()
def teach(teacher: Plain, images: Tensor, *, weights: bool = False) -> Taught:
    """What `teacher`, with a class token and `MultiHead` mixers, says; with `weights` also its attention."""
    tokens, _ = teacher.embed(images)
    seen = []
    for block in teacher.encoder.blocks:
        block = cast(TokenBlock, block)
        if weights:
            seen.append(cast(MultiHead, block.mixer).weights(block.norm1(tokens)))
        tokens = block(tokens)
    tokens = teacher.encoder.norm(tokens)
    return Taught(teacher.head(tokens[:, 0]), tokens[:, 1:], torch.stack(seen) if weights else None)


@register(
    Card(
        name="sparsifiner_losses",
        title="Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
        paper="2303.13755",
        system="sparsifiner",
        family="distillation",
        kind=RECIPE,
        cost="N²",
    )
)
def sparsifiner_losses(
    student: Outputs,
    teacher: Taught,
    labels: Tensor,
    *,
    logits: float = 0.5,
    tokens: float = 0.5,
    approximation: float = 0.01,
) -> Losses:
    """The losses of both phases; the keyword arguments are the weights of the parts.

        L = CE(student, labels) + 0.5 KL(teacher ‖ student) + 0.5 mean (patches − teacher's)²
            + 0.01 mean_layers Σ (approximation − teacher's attention of the patches)²       if the teacher has weights

    Only patches that were not dropped count. The predictors learn by the last line alone, which the authors have for
    the first 5 epochs (learning rate 3e-4 to 2e-4), before 45 epochs with masks and without it (8e-5 to 2e-6), both of
    AdamW with weight decay 0.05 and 3 epochs of warm-up. Source: arXiv 2303.13755 (lim142857/Sparsifiner).
    """
    if student.tokens.shape != teacher.tokens.shape:
        raise ValueError(
            f"teacher must have the student's tokens {tuple(student.tokens.shape)}, got {tuple(teacher.tokens.shape)}"
        )
    ours, theirs = student.tokens, teacher.tokens
    if student.alive is not None:
        ours, theirs = ours[student.alive], theirs[student.alive]
    right = F.cross_entropy(student.logits, labels)
    alike = F.kl_div(
        student.logits.log_softmax(-1), teacher.logits.log_softmax(-1), reduction="batchmean", log_target=True
    )
    near = F.mse_loss(ours, theirs)
    total = right + logits * alike + tokens * near
    expected = None
    if teacher.weights is not None:
        gap = student.approximations - teacher.weights[..., 1:, :]
        expected = gap.pow(2).sum() / len(gap)
        total = total + approximation * expected
    return Losses(total, right, alike, near, expected)
