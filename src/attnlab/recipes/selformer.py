"""SELFormer's training: guess masked tokens of molecules, then learn a property from a few that are labelled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.models.language.bert import Bert
from attnlab.recipes.minilm import Rate

TASKS = ("classes", "tasks", "number")


def mask_tokens(
    ids: Tensor,
    keep: Tensor,
    *,
    mask: int,
    vocabulary: int,
    specials: Iterable[int],
    rate: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """BERT's riddle, drawn anew at each call: (ids with holes, chosen), both (B, N).

    Of `rate` of the tokens, never a special one, 80 % become `mask`, 10 % any id and 10 % stay. At least one is chosen
    where there is one.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate must be in (0, 1], got {rate}")
    free = keep.bool() & ~torch.isin(ids, torch.tensor(sorted(specials), device=ids.device))
    draw = torch.rand(ids.shape, generator=generator, device=ids.device).masked_fill(~free, 2.0)
    chosen = (draw < rate) | ((draw == draw.min()) & free)
    kind = torch.rand(ids.shape, generator=generator, device=ids.device)
    other = torch.randint(vocabulary, ids.shape, generator=generator, device=ids.device)
    holes = ids.masked_fill(chosen & (kind < 0.8), mask)
    return torch.where(chosen & (kind >= 0.9), other, holes), chosen


def masked_loss(model: Bert, ids: Tensor, holes: Tensor, chosen: Tensor, keep: Tensor | None = None) -> Tensor:
    """−log p of the `chosen` tokens, given the text with `holes`; only theirs are the logits computed."""
    if model.output != "words":
        raise ValueError(f"model must have output='words' to guess tokens, got {model.output!r}")
    vectors = model.encode(holes, keep=keep)[chosen]
    return nn.functional.cross_entropy(model.predict(vectors), ids[chosen])


def property_loss(logits: Tensor, labels: Tensor, task: str) -> Tensor:
    """What fine-tuning lowers, from logits (B, labels).

    "classes": cross-entropy with the class (B,); "tasks": each task's own yes or no (B, labels), from logits;
    "number": the squared error of one number (B,).
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if task == "classes":
        return nn.functional.cross_entropy(logits, labels.view(-1))
    wanted = labels.to(logits.dtype)
    if task == "tasks":
        return nn.functional.binary_cross_entropy_with_logits(logits, wanted)
    if logits.shape[1] != 1 or wanted.numel() != len(logits):
        raise ValueError(
            f"a number needs logits (B, 1) and as many labels, got {tuple(logits.shape)}, {tuple(labels.shape)}"
        )
    return nn.functional.mse_loss(logits.flatten(), wanted.flatten())


def train(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    loss: Callable[..., Tensor],
    *,
    rate: float | Rate = 1e-5,
    weight_decay: float = 0.001,
) -> list[float]:
    """AdamW on `loss(model, **batch)`, in place; the loss at each step.

    As transformers' Trainer: gradients clipped at norm 1, and no decay of biases and norms. Rate and decay are the
    authors' for pre-training; their decay for fine-tuning is 0.1.
    """
    rates = rate if callable(rate) else lambda step: rate
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    )
    model.train()
    history = []
    for step, batch in enumerate(batches):
        value = loss(model, **batch)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rates(step)
        optimizer.step()
        history.append(value.item())
    return history
