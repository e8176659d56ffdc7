"""A task that takes a moment and mechanisms with known faults; loaded like a user's own file."""

import time

import torch
from torch import Tensor, nn

from attnlab.arena.task import Budget, Score, Task, task
from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.mechanism import Mechanism


@task
class Sums(Task):
    """The running mean of random numbers."""

    name, title, metric = "sums", "running means", "squared error"
    beyond = True
    budgets = {
        "small": Budget(parameters=4_000, depth=1, steps=30, batch=4, length=16, learning_rate=1e-2, examples=8),
        "medium": Budget(parameters=8_000, depth=1, steps=60, batch=4, length=16, examples=8),
    }

    def batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.budget.batch, self.budget.length, 1, generator=rng)
        return x, x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]

    def stem(self, width: int) -> nn.Module:
        return nn.Linear(1, width)

    def head(self, width: int) -> nn.Module:
        return nn.Linear(width, 1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()

    def evaluate(self, predict) -> Score:
        inputs, targets = self.batch(torch.Generator().manual_seed(1))
        outputs = predict(inputs)
        return Score((outputs - targets).square().mean().item(), {"first": outputs[0, 0].item()})

    def trivial(self) -> tuple[str, float]:
        return "zero", 1.0


class _Causal(Mechanism):
    def __init__(self, dim: int, *, causal: bool = False) -> None:
        super().__init__(dim, causal=causal)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, context=None, *, grid=None, pattern=None, state=None):
        return self.out(x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None])


def _card(name: str, capabilities=CAUSAL_SELF | NONCAUSAL_SELF | ANY_LENGTH) -> Card:
    return Card(name=name, title=name, paper="0000.00000", family="toys", kind=TOKENS, capabilities=capabilities)


@register(_card("toy"))
class Toy(_Causal):
    """A causal mean."""


@register(_card("toy_bad"))
class Bad(_Causal):
    """Its output is not a number."""

    def forward(self, x, context=None, *, grid=None, pattern=None, state=None):
        return super().forward(x) * float("nan")


@register(_card("toy_broken"))
class Broken(_Causal):
    """Raises."""

    def forward(self, x, context=None, *, grid=None, pattern=None, state=None):
        raise ArithmeticError("a toy that broke")


@register(_card("toy_hungry"))
class Hungry(_Causal):
    """Keeps 64 MiB per example for its backward pass."""

    def forward(self, x, context=None, *, grid=None, pattern=None, state=None):
        kept = (x.mean() * torch.ones(2**24)).exp()
        return super().forward(x) + 0 * kept.sum()


@register(_card("toy_slow"))
class Slow(_Causal):
    """Takes its time."""

    def forward(self, x, context=None, *, grid=None, pattern=None, state=None):
        time.sleep(0.02)
        return super().forward(x)


@register(_card("toy_sees_all", NONCAUSAL_SELF | ANY_LENGTH))
class SeesAll(_Causal):
    """Not causal."""
