"""Multi-query associative recall: a dictionary is read once, then asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ends import Symbols
from ..task import Budget, Score, Task, task

_KEYS, _VALUES = 32, 32


@task
class Recall(Task):
    """`k₁ v₁ k₂ v₂ … kₙ vₙ` and then the keys again in another order: say each one's value (arXiv 2312.04927).

    Keys and values are drawn anew for each example, so nothing can be learned by heart: it measures how much of its
    context a mechanism can hold and address. Trained with `length / 4` pairs; the details also ask half and twice that.
    Trivial: any of the values in the context.
    """

    name = "recall"
    title = "values of keys seen once before"
    metric = "accuracy"
    better = "higher"
    beyond = True
    budgets = {
        "small": Budget(parameters=60_000, depth=2, steps=300, batch=32, length=32, learning_rate=6e-3, examples=256),
        "medium": Budget(parameters=250_000, depth=2, steps=2_000, batch=64, length=64, examples=512),
    }

    def batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return _dictionaries(rng, self.budget.batch, self.budget.length // 4)

    def stem(self, width: int) -> nn.Module:
        return Symbols(_KEYS + _VALUES, width)

    def head(self, width: int) -> nn.Module:
        return nn.Linear(width, _VALUES)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def evaluate(self, predict: Callable[[Tensor], Tensor]) -> Score:
        rng = torch.Generator().manual_seed(7)
        trained = self.budget.length // 4
        accuracy = {}
        for pairs in (trained // 2, trained, 2 * trained):
            inputs, targets = _dictionaries(rng, self.budget.examples, pairs)
            right = torch.cat([predict(part).argmax(-1) for part in inputs.split(64)]) == targets
            accuracy[pairs] = right[targets >= 0].double().mean().item()
        return Score(accuracy[trained], {"accuracy by number of pairs": accuracy})

    def trivial(self) -> tuple[str, float]:
        return "any value seen", 4 / self.budget.length


def _dictionaries(rng: torch.Generator, batch: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Sequences (batch, 4·pairs) of key, value, key, value …; targets are -1 where nothing is asked."""
    keys = torch.rand(batch, _KEYS, generator=rng).argsort(1)[:, :pairs]
    values = torch.randint(_VALUES, (batch, pairs), generator=rng)
    order = torch.rand(batch, pairs, generator=rng).argsort(1)
    asked, answers = keys.gather(1, order), values.gather(1, order)
    first, second = torch.stack((keys, values + _KEYS), -1), torch.stack((asked, answers + _KEYS), -1)
    inputs = torch.cat((first, second), 1).flatten(1)
    targets = torch.full_like(inputs, -1)
    targets[:, 2 * pairs :: 2] = answers
    return inputs, targets
