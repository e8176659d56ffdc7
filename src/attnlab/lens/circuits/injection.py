"""A task without its examples: what heads say after few-shot prompts, mixed into what they say after a bare one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import LENS, Card, register
from attnlab.lens.circuits.traces import Tracer, positions
from attnlab.lens.event import Event
from attnlab.lens.steer import Edit, steer
from attnlab.lens.tap import join


def mixed_in(heads: Tensor, embedding: Tensor, alpha: Tensor, last: Tensor | None = None) -> Tensor:
    """`(1 − α_h) z_h + α_h E_h` at the last token of each prompt, the rest untouched.

    heads z `(B, H, N, D)`, before the output projection; embedding E `(H, D)` or `(B, H, D)`; alpha `(H,)`; last
    `(B,)`: where the last token that is no padding stands, if that is not the end. One token alone, as in decoding, is
    left as it is.
    """
    batch, _, tokens, _ = heads.shape
    if tokens == 1:
        return heads
    at = heads.new_full((batch,), tokens - 1, dtype=torch.long) if last is None else last.to(heads.device)
    there = torch.arange(tokens, device=heads.device) == at[:, None]
    if embedding.dim() == 2:
        embedding = embedding[None]
    weight = alpha.to(heads)[:, None, None] * there[:, None, :, None]
    # Where nothing is mixed in, the very same numbers stay: 0 · E would not be 0 if E were not finite.
    return torch.where(weight != 0, heads + weight * (embedding.to(heads)[:, :, None] - heads), heads)


@torch.no_grad()
def task_embedding(model: nn.Module, prompts: Tensor | Sequence[Tensor], *, last: Tensor | None = None) -> Tensor:
    """`(layers, heads, D)`: the mean over few-shot `prompts` of what each head says after the last token.

    prompts: ids `(M, N)`, or several such of different lengths; `last (M,)`, with one of them, as in `mixed_in`.
    """
    total, count = torch.zeros(()), 0
    for ids in [prompts] if isinstance(prompts, Tensor) else prompts:
        tracer = Tracer(positions(None if last is not None else -1))
        leave = join(model, tracer)
        try:
            model(ids)
        finally:
            leave()
        layers = [tracer.trace.heads[i, "z"] for i in range(tracer.trace.shape[0])]
        z = torch.stack(layers, 1)  # (M, L, H, P, D)
        z = z[..., 0, :] if last is None else z[torch.arange(len(z)), :, :, last]
        total, count = total + z.sum(0), count + len(ids)
    return total / count


@register(
    Card(
        name="soft_injection",
        title="Soft Injection of Task Embeddings Outperforms Prompt-Based In-Context Learning",
        paper="2507.20906",
        system="soft_injection",
        family="circuits",
        kind=LENS,
        cost="L·H numbers learned; nothing added to a pass",
    )
)
class SoftInjection(nn.Module):
    """How much of a task's embedding each head takes: `layers · heads` numbers, and nothing else to learn.

        z_lh ← (1 − σ(a_lh)) z_lh + σ(a_lh) E_lh        at the prompt's last token, in all layers of one pass

    Use: `with lens.steer(model, injection.edit()): model.generate(ids)`. A pass over one token, as each is that decodes
    with a cache, is left alone: what is decoded is touched only through the cache. Source: arXiv 2507.20906.

    Args:
        embedding: `(layers, heads, D)` of `task_embedding`.
        alpha: a start other than σ(0) = ½: `(layers, heads)`, zeros and ones too, as when heads are replaced whole.
    """

    def __init__(self, embedding: Tensor, alpha: Tensor | None = None) -> None:
        super().__init__()
        if embedding.dim() != 3:
            raise ValueError(f"embedding must have shape (layers, heads, D), got {tuple(embedding.shape)}")
        start = embedding.new_zeros(embedding.shape[:2])
        if alpha is not None:
            if alpha.shape != start.shape:
                raise ValueError(f"alpha must have shape {tuple(start.shape)}, got {tuple(alpha.shape)}")
            start = alpha.to(start).logit()  # ±∞ for ones and zeros
        self.embedding: Tensor
        self.register_buffer("embedding", embedding.detach().clone())
        self.logits = nn.Parameter(start)

    @property
    def alpha(self) -> Tensor:
        return self.logits.sigmoid()

    def edit(self, *, last: Tensor | None = None, embedding: Tensor | None = None) -> Edit:
        """For `steer`: `last (B,)` of prompts padded on the right; `embedding` of another task, with these weights."""
        return _Inject(self.alpha, self.embedding if embedding is None else embedding, last)


class _Inject(Edit):
    def __init__(self, alpha: Tensor, embedding: Tensor, last: Tensor | None) -> None:
        super().__init__()
        self.alpha, self.embedding, self.last = alpha, embedding, last

    def output(self, event: Event, out: Tensor) -> Tensor:
        layers, heads = self.alpha.shape
        if event.layer >= layers or event.heads != heads:
            raise ValueError(
                f"the injection is for {layers} layers of {heads} heads; {event.name} is layer {event.layer} with "
                f"{event.heads}"
            )
        return mixed_in(out, self.embedding[event.layer], self.alpha[event.layer], self.last)


@dataclass(frozen=True)
class Task:
    """A task's embedding `(layers, heads, D)`, bare prompts `(B, N)` and the first token of each answer `(B,)`.

    The last `validation` of the prompts are kept for choosing among the checkpoints. `last (B,)`: see `mixed_in`.
    """

    embedding: Tensor
    ids: Tensor
    answers: Tensor
    last: Tensor | None = None
    validation: int = 100

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.answers):
            raise ValueError(f"answers must be one for each of {len(self.ids)} prompts, got {len(self.answers)}")
        if not 0 < self.validation < len(self.ids):
            raise ValueError(f"validation must leave some of {len(self.ids)} prompts, got {self.validation}")


def train_injection(
    model: nn.Module,
    tasks: Task | Sequence[Task],
    *,
    steps: int = 400,
    learning_rate: float = 0.2,
    every: int = 50,
    select: Literal["best", "last"] = "best",
    seed: int = 0,
) -> SoftInjection:
    """Learns how much each head takes, for one task, or for all of several at once; the model stays as it is.

    Adam on one random prompt a step, cross-entropy of the answer's first token; every `every` steps the loss on the
    validation prompts. select: "best" keeps the weights with the least of these, "last" those of the last step, which
    is what the authors' code does.
    """
    listed = [tasks] if isinstance(tasks, Task) else list(tasks)
    if not listed:
        raise ValueError("tasks must be one Task or more, got none")
    if select not in ("best", "last"):
        raise ValueError(f"select must be 'best' or 'last', got {select!r}")
    rng = torch.Generator().manual_seed(seed)
    injection = SoftInjection(listed[0].embedding)
    optimizer = torch.optim.Adam([injection.logits], lr=learning_rate)
    best, kept = math.inf, injection.logits.detach().clone()
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    model.eval().requires_grad_(False)
    try:
        for step in range(1, steps + 1):
            task = listed[int(torch.randint(len(listed), (), generator=rng))]
            row = int(torch.randint(len(task.ids) - task.validation, (), generator=rng))
            loss = _loss(model, injection, task, slice(row, row + 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if select == "best" and (step % every == 0 or step == steps):
                with torch.no_grad():
                    held = sum(float(_loss(model, injection, t, slice(-t.validation, None))) for t in listed)
                if held < best:
                    best, kept = held, injection.logits.detach().clone()
    finally:
        model.train(training)
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
    if select == "best":
        with torch.no_grad():
            injection.logits.copy_(kept)
    return injection


def _loss(model: nn.Module, injection: SoftInjection, task: Task, part: slice) -> Tensor:
    ids, answers = task.ids[part], task.answers[part]
    last = None if task.last is None else task.last[part]
    with steer(model, injection.edit(last=last, embedding=task.embedding)):
        logits = model(ids)
    logits = getattr(logits, "logits", logits)
    at = logits[:, -1] if last is None else logits[torch.arange(len(ids)), last]
    return F.cross_entropy(at, answers)
