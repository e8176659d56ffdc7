"""Which heads carry what makes two prompts differ: activation patching, and path patching to chosen receivers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from attnlab.cards import LENS, Card, register
from attnlab.lens.circuits.traces import (
    Inputs,
    Part,
    Trace,
    Tracer,
    Writer,
    count,
    mlps_of,
    positions,
    rows,
    run,
)
from attnlab.lens.tap import join

Metric = Callable[[Tensor, Tensor], Tensor]
Head = tuple[int, int]  # layer, head


def logit_difference(logits: Tensor, answers: Tensor) -> Tensor:
    """How much likelier, in logits, the right answer is than the wrong one after the last token: `(B,)`.

    `logits (B, N, V)`, or `(B, V)`; `answers (B, 2)`: ids of the right one and the wrong one.
    """
    last = logits[:, -1] if logits.dim() == 3 else logits
    right, wrong = last.gather(1, answers).unbind(1)
    return right - wrong


def activation_patching(
    model: nn.Module,
    clean: Inputs,
    corrupt: Inputs,
    answers: Tensor,
    *,
    part: Part = "z",
    position: int | slice | None = -1,
    metric: Metric = logit_difference,
    normalise: bool = True,
    batch: int | None = None,
    together: int = 8,
) -> Tensor:
    """What one head of the corrupt run does in the clean run: `(layers, heads)`, 0 nothing, 1 all of the difference.

        effect[l, h] = (D(clean, but part of (l, h) from corrupt) − D(clean)) / (D(corrupt) − D(clean))

    where D is the mean of `metric`. Everything after the head follows: the effect is the head's whole one, by all
    paths. L·H + 2 passes, `together` of them at once. Arguments as in `path_patching`.
    """
    effects = []
    for clean_rows, corrupt_rows, answer_rows in _batches(clean, corrupt, answers, batch):
        here = _Comparison(model, clean_rows, corrupt_rows, answer_rows, metric, position, together, [part], [])
        layers, heads = here.clean.shape
        effect = torch.zeros(layers, heads, dtype=here.base.dtype)
        for group in here.groups([(i, h) for i in range(layers) for h in range(here.heads(i))]):
            writes = here.written(group, part, here.corrupt, {})
            for (i, h), value in zip(group, here.measure(len(group), writes, {}), strict=True):
                effect[i, h] = value
        effects.append(here.relative(effect, normalise))
    return torch.stack(effects).mean(0)


@register(
    Card(
        name="path_patching",
        title="Circuit Component Reuse Across Tasks in Transformer Language Models",
        paper="2310.08744",
        system="circuit_reuse",
        family="circuits",
        kind=LENS,
        cost="2·L·H + 2 passes",
    )
)
def path_patching(
    model: nn.Module,
    clean: Inputs,
    corrupt: Inputs,
    answers: Tensor,
    *,
    receivers: str | Sequence[Head],
    part: Literal["q", "k", "v"] | None = None,
    position: int | slice | None = -1,
    freeze_mlps: bool | str | Sequence[str] = False,
    truncate: bool = True,
    metric: Metric = logit_difference,
    normalise: bool = True,
    batch: int | None = None,
    together: int = 8,
) -> Tensor:
    """What each head tells the receivers directly: `(layers, heads)`, positive towards the corrupt prompt's answer.

    For each sender (l, h), a run on `clean` in which the output of the sender at `position` is the corrupt run's and
    that of every other head is the clean run's gives what the receivers would hear; a second run on `clean`, with that
    in place of what the receivers heard and nothing else held, gives D(patched):

        effect[l, h] = (D(patched) − D(clean)) / (D(corrupt) − D(clean))

    With the last block as receiver it is the direct effect on the logits. Published maps show −100 · effect. What goes
    with it: `circuits.prompts` (the tasks), `circuits.overlap` (shared heads, and idle ones pointed).
    Cost: 2 L·H + 2 passes, `together` of them at once. Source: arXiv 2310.08744.

    Args:
        clean, corrupt: ids `(B, N)`, or the keywords of the model's call; answers `(B, 2)`: right and wrong ids, or
            whatever `metric(logits, answers) -> (B,)` takes.
        receivers: the name of a module, which hears with its output ("blocks.2": the residual stream after it); or
            heads, as pairs (layer, head), which hear with their `part`: q, k or v. A head among several that share
            their keys has its own all the same.
        position: of the token; several (a slice), or None for all.
        freeze_mlps: hold the MLPs at `position` too: True for all modules so called, or names, or globs.
        truncate: senders in layers after that of the first receiver are not asked.
        normalise: False for D(patched) − D(clean).
        batch: prompts at a time; the effects of the batches are averaged.
    """
    parts = _check(receivers, part)
    frozen = mlps_of(model, freeze_mlps)
    effects = []
    for clean_rows, corrupt_rows, answer_rows in _batches(clean, corrupt, answers, batch):
        here = _Comparison(model, clean_rows, corrupt_rows, answer_rows, metric, position, together, parts, frozen)
        layers, heads = here.clean.shape
        effect = torch.zeros(layers, heads, dtype=here.base.dtype)
        for group in here.groups(_senders(here, receivers, truncate)):
            heard = here.hear(group, receivers, part)
            if isinstance(receivers, str):
                values = here.measure(len(group), {}, {receivers: heard.modules[receivers]})
            else:
                values = here.measure(len(group), here.received(receivers, str(part), heard, len(group)), {})
            for (i, h), value in zip(group, values, strict=True):
                effect[i, h] = value
        effects.append(here.relative(effect, normalise))
    return torch.stack(effects).mean(0)


class _Comparison:
    """Two runs of a model and what each left behind, and runs between the two."""

    def __init__(
        self, model: nn.Module, clean: Inputs, corrupt: Inputs, answers: Tensor, metric: Metric,
        position: int | slice | None, together: int, parts: Sequence[str], frozen: Sequence[str],
    ) -> None:  # fmt: skip
        self.model, self.inputs, self.answers, self.metric = model, clean, answers, metric
        self.size, self.position, self.together = count(clean), positions(position), together
        self.frozen = frozen
        self.clean, self.base = self._traced(clean, parts)
        self.corrupt, self.other = self._traced(corrupt, parts)

    def _traced(self, inputs: Inputs, parts: Sequence[str]) -> tuple[Trace, Tensor]:
        tracer = Tracer(self.position, parts, self.frozen)
        leave = join(self.model, tracer)
        try:
            logits = run(self.model, inputs)
        finally:
            leave()
        return tracer.trace, self.metric(logits, self.answers).mean()

    def heads(self, layer: int) -> int:
        return self.clean.heads[layer, "z"].shape[1]

    def groups(self, senders: Sequence[Head]) -> Iterator[list[Head]]:
        for start in range(0, len(senders), self.together):
            yield list(senders[start : start + self.together])

    def written(
        self, group: Sequence[Head], part: str, source: Trace, held: dict[tuple[int, str], tuple[Tensor, Tensor]]
    ) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
        """`held`, and in the i-th copy of the batch the part of the i-th head of `group` from `source`."""
        writes = dict(held)
        for layer in sorted({i for i, _ in group}):
            own = (layer, part)
            value = source.heads[own].repeat(len(group), 1, 1, 1)
            meant = torch.zeros(len(group), self.heads(layer), dtype=torch.bool, device=value.device)
            for row, (i, h) in enumerate(group):
                meant[row, h] = i == layer
            meant = meant.repeat_interleave(self.size, 0)
            if own in held:
                value = torch.where(meant[:, :, None, None], value, held[own][0])
                meant = held[own][1]
            writes[own] = (value, meant)
        return writes

    def hear(self, group: Sequence[Head], receivers: str | Sequence[Head], part: str | None) -> Trace:
        """What the receivers hear when one head of each copy speaks as in the corrupt run, the others as ever."""
        held = {}
        for (layer, kind), z in self.clean.heads.items():
            if kind == "z":
                z = z.repeat(len(group), 1, 1, 1)
                held[layer, kind] = (z, torch.ones(z.shape[:2], dtype=torch.bool, device=z.device))
        frozen = {name: self.clean.modules[name].repeat(len(group), 1, 1) for name in self.frozen}
        writer = Writer(self.position, self.written(group, "z", self.corrupt, held), frozen)
        tracer = Tracer(self.position, [part] if part else [], [receivers] if isinstance(receivers, str) else [])
        leave = join(self.model, tracer, writer)
        try:
            run(self.model, self._copies(len(group)))
        finally:
            leave()
        return tracer.trace

    def received(
        self, receivers: Sequence[Head], part: str, heard: Trace, copies: int
    ) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
        writes = {}
        for layer in sorted({i for i, _ in receivers}):
            value = heard.heads[layer, part]
            meant = torch.zeros(1, self.heads(layer), dtype=torch.bool, device=value.device)
            meant[0, [h for i, h in receivers if i == layer]] = True
            writes[layer, part] = (value, meant.expand(copies * self.size, -1))
        return writes

    def measure(
        self, copies: int, heads: dict[tuple[int, str], tuple[Tensor, Tensor]], modules: dict[str, Tensor]
    ) -> list[Tensor]:
        """D(patched) − D(clean) of each copy."""
        leave = join(self.model, Writer(self.position, heads, modules))
        try:
            logits = run(self.model, self._copies(copies))
        finally:
            leave()
        return [self.metric(part, self.answers).mean() - self.base for part in logits.split(self.size)]

    def _copies(self, copies: int) -> Inputs:
        return rows(self.inputs, torch.arange(self.size).repeat(copies))

    def relative(self, effect: Tensor, normalise: bool) -> Tensor:
        if not normalise:
            return effect
        whole = (self.other - self.base).cpu()
        if whole == 0:
            raise ValueError(
                "corrupt must change the metric: it gives what clean gives, and the effects have no scale "
                "(normalise=False gives them as they are)"
            )
        return effect / whole


def _batches(
    clean: Inputs, corrupt: Inputs, answers: Tensor, batch: int | None
) -> Iterator[tuple[Inputs, Inputs, Tensor]]:
    size = count(clean)
    for name, other in (("corrupt", count(corrupt)), ("answers", len(answers))):
        if other != size:
            raise ValueError(f"{name} must have as many rows as clean, {size}, got {other}")
    for start in range(0, size, batch or size):
        part = slice(start, start + (batch or size))
        yield rows(clean, part), rows(corrupt, part), answers[part]


def _check(receivers: str | Sequence[Head], part: str | None) -> list[str]:
    """The parts of heads that are needed."""
    if isinstance(receivers, str):
        if part is not None:
            raise ValueError(f"part goes with heads as receivers; the module {receivers!r} hears with its output")
        return []
    if not receivers:
        raise ValueError("receivers must be the name of a module or one (layer, head) or more, got none")
    if part not in ("q", "k", "v"):
        raise ValueError(f"part must be 'q', 'k' or 'v' where receivers are heads, got {part!r}")
    return [part]


def _senders(here: _Comparison, receivers: str | Sequence[Head], truncate: bool) -> list[Head]:
    layers, _ = here.clean.shape
    there = [(i, h) for i in range(layers) for h in range(here.heads(i))]
    if isinstance(receivers, str):
        return there
    for pair in receivers:
        if tuple(pair) not in there:
            raise ValueError(f"receiver {tuple(pair)} is not there: layers 0 to {layers - 1}, heads as {there[-1]}")
    first, last = min(i for i, _ in receivers), max(i for i, _ in receivers)
    # A head cannot be heard in its own layer or before it: its effect is zero.
    end = min(last - 1, first) if truncate else last - 1
    return [(i, h) for i, h in there if i <= end and (i, h) not in {tuple(pair) for pair in receivers}]
