"""Looking up: queries ask a context for what lies under their keys, all of it or what has come so far."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..task import CAUSAL_CROSS, CROSS, Budget, Score, Task, task

_KEYS, _VALUES = 64, 32


class Pairs(nn.Module):
    """From (key, value) pairs (B, N, 2) to tokens (B, N, C); the value `_VALUES` stands for none."""

    def __init__(self, width: int):
        super().__init__()
        self.keys, self.values = nn.Embedding(_KEYS, width), nn.Embedding(_VALUES + 1, width)
        for table in (self.keys, self.values):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, pairs: Tensor) -> Tensor:
        return self.keys(pairs[..., 0]) + self.values(pairs[..., 1])


@task
class Lookup(Task):
    """A context of key-value pairs and as many queries, each a key of the context: say its value.

    Cross attention: the context is the first half of the tokens and is not mixed. Keys are drawn without repetition,
    values with; both anew for each example. Trivial: one of all values.
    """

    name = "lookup"
    title = "values of keys in another sequence"
    metric = "accuracy"
    better = "higher"
    layout = CROSS
    budgets = {
        "small": Budget(parameters=60_000, depth=2, steps=150, batch=32, length=64, learning_rate=6e-3, examples=256),
        "medium": Budget(parameters=250_000, depth=2, steps=1_000, batch=64, length=96, examples=512),
    }
    seen_so_far = False

    def batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return self._draw(rng, self.budget.batch)

    def stem(self, width: int) -> nn.Module:
        return Pairs(width)

    def head(self, width: int) -> nn.Module:
        return nn.Linear(width, _VALUES)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.chunk(2, 1)[1].flatten(0, 1), targets.flatten())

    def evaluate(self, predict: Callable[[Tensor], Tensor]) -> Score:
        inputs, targets = self._draw(torch.Generator().manual_seed(7), self.budget.examples)
        said = torch.cat([predict(part).chunk(2, 1)[1].argmax(-1) for part in inputs.split(64)])
        return Score((said == targets).double().mean().item())

    def trivial(self) -> tuple[str, float]:
        return "one of all values", 1 / _VALUES

    def _draw(self, rng: torch.Generator, batch: int) -> tuple[Tensor, Tensor]:
        """Inputs (batch, 2·pairs, 2), context first, and the value that each query asks for (batch, pairs)."""
        pairs = self.budget.length // 2
        keys = torch.rand(batch, _KEYS, generator=rng).argsort(1)[:, :pairs]
        values = torch.randint(_VALUES, (batch, pairs), generator=rng)
        known = torch.arange(1, pairs + 1) if self.seen_so_far else torch.full((pairs,), pairs)
        asked = (torch.rand(batch, pairs, generator=rng) * known).long()
        context = torch.stack((keys, values), -1)
        queries = torch.stack((keys.gather(1, asked), torch.full_like(values, _VALUES)), -1)
        return torch.cat((context, queries), 1), values.gather(1, asked)


@task
class CausalLookup(Lookup):
    """The same, where query i sees the context up to its own place and asks for what is there."""

    name = "causal-lookup"
    title = "values of keys in another sequence so far"
    layout = CAUSAL_CROSS
    seen_so_far = True
