"""MiniLM: a small model learns the last self-attention of a large one, whatever its width and depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnlab.cards import RECIPE, Card, register
from attnlab.nn.mechanism import join_heads, split_heads
from attnlab.nn.multihead import MultiHead

# Attention distributions and value relations, of equal weight.
RELATIONS: Mapping[str, float] = {"qk": 1.0, "vv": 1.0}


class Heads(NamedTuple):
    """What one attention layer compares and mixes: each `(B, A, N, D)`."""

    q: Tensor
    k: Tensor
    v: Tensor


def log_relation(a: Tensor, b: Tensor, keep: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """log softmax(a bᵀ / √D) over the keys: heads `(B, A, N, D)` → `(B, A, N, N)`.

    With q and k that is the attention; with v and v, the value relation. Keys outside `keep` (B, N) get a log so low
    that its exponential is 0, yet finite.
    """
    scores = a @ b.transpose(-1, -2) * a.shape[-1] ** -0.5
    low = torch.finfo(scores.dtype).min / 2
    if keep is not None:
        scores = scores.masked_fill(~keep.bool()[:, None, None], low)
    if causal:
        n = scores.shape[-1]
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=a.device).triu(1), low)
    return scores.log_softmax(-1)


@register(
    Card(
        name="minilm",
        title="MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers",
        paper="2002.10957",
        system="minilm",
        family="distillation",
        kind=RECIPE,
        cost="N²",
    )
)
def minilm_losses(
    teacher: Heads,
    student: Heads,
    *,
    keep: Tensor | None = None,
    relations: Mapping[str, float] = RELATIONS,
    heads: int | None = None,
    causal: bool = False,
) -> dict[str, Tensor]:
    """How far the student's last attention is from the teacher's, one scalar per relation; their sum is the loss.

        L_AT = 1/(A n) Σ_a Σ_t KL(Aᵀ_at ‖ Aˢ_at)         A = softmax(Q Kᵀ / √D): "qk"
        L_VR = the same of softmax(V Vᵀ / √D): "vv"      averaged over the batch, n = each text's own length

    Widths and depths may differ, as N × N matrices are compared; the numbers of heads are equal, or `heads` regroups
    the channels of both into so many (version 2 of the method, arXiv 2012.15828, with relations "qq", "kk", "vv").
    Cost: 2N²C per relation and model. No gradient reaches the teacher. Source: arXiv 2002.10957.

    Args:
        teacher, student: q, k, v of one layer each, as `last_attention` gives them.
        keep: (B, N), false at padding, which then changes nothing.
        relations: pairs out of q, k, v, with their weights.
        causal: both models are causal.
    """
    if heads is not None:
        teacher, student = (Heads(*(_regroup(t, heads) for t in side)) for side in (teacher, student))
    (b, a, n, _), (b2, a2, n2, _) = teacher.q.shape, student.q.shape
    if (b, n) != (b2, n2):
        raise ValueError(f"teacher and student must see the same texts, got (B, N) = {(b, n)} and {(b2, n2)}")
    if a != a2:
        raise ValueError(f"teacher and student need equally many heads, got {a} and {a2} (or give heads=)")
    if keep is not None and keep.shape != (b, n):
        raise ValueError(f"keep must be {(b, n)}, got {tuple(keep.shape)}")
    if unknown := [pair for pair in relations if len(pair) != 2 or set(pair) - set("qkv")]:
        raise ValueError(f"relations must be pairs out of q, k, v such as 'qk', got {unknown}")
    rows = torch.ones(b, n, device=student.q.device) if keep is None else keep
    weight = rows.to(student.q.dtype)
    weight = weight / (a * b * weight.sum(1, keepdim=True))
    losses = {}
    for pair, share in relations.items():
        with torch.no_grad():
            wanted = log_relation(getattr(teacher, pair[0]), getattr(teacher, pair[1]), keep, causal=causal)
        found = log_relation(getattr(student, pair[0]), getattr(student, pair[1]), keep, causal=causal)
        divergence = (wanted.exp() * (wanted - found)).sum(-1)
        losses[pair] = share * (divergence * weight[:, None]).sum()
    return losses


def _regroup(x: Tensor, heads: int) -> Tensor:
    if (x.shape[1] * x.shape[3]) % heads:
        raise ValueError(f"heads must divide the {x.shape[1] * x.shape[3]} channels of a layer, got {heads}")
    return x if x.shape[1] == heads else split_heads(join_heads(x), heads)


def attentions(model: nn.Module) -> list[MultiHead]:
    """The attention layers of a model, in order."""
    found = [module for module in model.modules() if isinstance(module, MultiHead)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no MultiHead attention to learn from")
    return found


def last_attention(model: nn.Module, *inputs: Any, layer: int = -1, **keywords: Any) -> Heads:
    """q, k, v of an attention layer, normed and turned to their positions, while `model(*inputs, **keywords)` runs."""
    mixer, seen = attentions(model)[layer], []

    def look(module: MultiHead, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        grid = options.get("grid") if module.on_grid else None
        q, k, v = module.project(args[0], grid=grid)
        groups = module.heads // module.kv_heads
        seen.append(Heads(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))

    hook = mixer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        model(*inputs, **keywords)
    finally:
        hook.remove()
    return seen[-1]


Rate = Callable[[int], float]


def warm_then_decay(peak: float, steps: int, *, warm_up: int = 0) -> Rate:
    """The learning rate at a step: linearly up to `peak` over `warm_up` steps, then linearly down to 0 at `steps`."""
    if not 0 <= warm_up < steps:
        raise ValueError(f"warm_up must be in [0, steps = {steps}), got {warm_up}")
    return lambda step: peak * min((step + 1) / max(warm_up, 1), (steps - step) / (steps - warm_up))


def distil(
    teacher: nn.Module,
    student: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    rate: float | Rate = 5e-4,
    weight_decay: float = 0.01,
    relations: Mapping[str, float] = RELATIONS,
    heads: int | None = None,
) -> list[float]:
    """Trains `student` in place to attend as `teacher` does, by AdamW over `batches`; the loss at each step.

    A batch is the keywords of both models: `ids`, and where there is padding `keep`. What lies behind the student's
    last attention stays as it was: fine-tuning trains it.
    """
    causal = {side: attentions(model)[-1].causal for side, model in (("teacher", teacher), ("student", student))}
    if len(set(causal.values())) > 1:
        raise ValueError(f"teacher and student must both be causal or neither, got {causal}")
    rates = rate if callable(rate) else lambda step: rate
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.999), weight_decay=weight_decay)
    teacher.eval()
    student.train()
    history = []
    for step, batch in enumerate(batches):
        with torch.no_grad():
            wanted = last_attention(teacher, **batch)
        losses = minilm_losses(
            wanted, last_attention(student, **batch), keep=batch.get("keep"), relations=relations, heads=heads,
            causal=causal["teacher"],
        )  # fmt: skip
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rates(step)
        optimizer.step()
        history.append(loss.item())
    return history


def needs_assistant(teacher: nn.Module, student: nn.Module) -> bool:
    """Whether the step is so large that an assistant pays: at most half the layers and at most half the width."""
    (big, small) = (attentions(teacher), attentions(student))
    return 2 * len(small) <= len(big) and 2 * small[-1].dim <= big[-1].dim


def distil_through(
    models: list[nn.Module], batches: Callable[[], Iterable[Mapping[str, Any]]], **options: Any
) -> list[list[float]]:
    """`distil` down a chain: teacher, assistant (of the teacher's depth and the student's width), student.

    `batches()` gives the batches of one step of the chain; `options` are `distil`'s. One list of losses per step.
    """
    if len(models) < 2:
        raise ValueError(f"models must be at least a teacher and a student, got {len(models)}")
    return [distil(big, small, batches(), **options) for big, small in pairwise(models)]
