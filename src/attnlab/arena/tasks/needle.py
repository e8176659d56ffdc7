"""Needle in a haystack: one fact in a long context, at every depth, and in contexts longer than those trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ends import Symbols
from ..task import Budget, Score, Task, task

_HAY, _MARKS, _VALUES = 32, 8, 16
_NEEDLES = 4  # hidden in each example; all are asked for in training, one in evaluation
_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_LENGTHS = (1, 2, 4)  # times the training length


@task
class Needle(Task):
    """Random hay with four marked values in it; at the end each mark is shown again: say its value.

    Metric: accuracy averaged over five depths (0 is the far end) and one, two and four times the training length; the
    details hold the whole table. Trivial: any of the four values hidden.
    """

    name = "needle"
    title = "one fact in a long context"
    metric = "accuracy"
    better = "higher"
    beyond = True
    budgets = {
        "small": Budget(parameters=60_000, depth=2, steps=220, batch=8, length=128, learning_rate=6e-3, examples=32),
        "medium": Budget(parameters=250_000, depth=2, steps=1_500, batch=16, length=512, examples=64),
    }

    def batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return _haystacks(rng, self.budget.batch, self.budget.length)

    def stem(self, width: int) -> nn.Module:
        return Symbols(_HAY + _MARKS + _VALUES, width)

    def head(self, width: int) -> nn.Module:
        return nn.Linear(width, _VALUES)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def evaluate(self, predict: Callable[[Tensor], Tensor]) -> Score:
        rng = torch.Generator().manual_seed(11)
        table = {}
        for length in (times * self.budget.length for times in _LENGTHS):
            row = {}
            for depth in _DEPTHS:
                inputs, targets = _haystacks(rng, self.budget.examples, length, depth)
                answers = torch.cat([predict(part)[:, -2 * _NEEDLES].argmax(-1) for part in inputs.split(16)])
                row[depth] = (answers == targets[:, -2 * _NEEDLES]).double().mean().item()
            table[length] = row
        mean = sum(sum(row.values()) for row in table.values()) / (len(_LENGTHS) * len(_DEPTHS))
        return Score(mean, {"accuracy by length · depth": table})

    def trivial(self) -> tuple[str, float]:
        return "any value hidden", 1 / _NEEDLES


def _haystacks(rng: torch.Generator, batch: int, length: int, depth: float | None = None) -> tuple[Tensor, Tensor]:
    """Sequences (batch, length) that end in `mark value` per needle; with `depth`, the first one asked lies there."""
    room = (length - 2 * _NEEDLES) // 2  # the hay has places of two symbols, so that needles never overlap
    places = torch.rand(batch, room, generator=rng).argsort(1)[:, :_NEEDLES]
    if depth is not None:
        wanted = round(depth * (room - 1))
        places = torch.where(
            places == wanted, places[:, :1], places
        )  # whoever lies there changes places with the first
        places[:, 0] = wanted
    marks = torch.rand(batch, _MARKS, generator=rng).argsort(1)[:, :_NEEDLES] + _HAY
    values = torch.randint(_VALUES, (batch, _NEEDLES), generator=rng)
    needles = torch.stack((marks, values + _HAY + _MARKS), -1)  # (batch, needles, 2)
    hay = torch.randint(_HAY, (batch, room, 2), generator=rng)
    hay.scatter_(1, places[:, :, None].expand(-1, -1, 2), needles)
    inputs = torch.cat((hay, needles), 1).flatten(1)
    targets = torch.full_like(inputs, -1)
    targets[:, -2 * _NEEDLES :: 2] = values
    return inputs, targets
