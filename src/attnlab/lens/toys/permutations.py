"""Tasks told by examples: `; x f(x) ; x f(x) ; … ; x`, where f is one of eight permutations; say f(x).

The permutations are learned by heart; which of them is meant, only the examples say. Without any, the best guess is
right in one case of eight.

The circuit: at each f(x) the first layer sees the x before it, and its MLP finds the task; the second layer carries the
task to the last token, where its MLP finds f(x). So that the task travels as one vector, the same whatever x is asked,
the first layer sees nothing but the token before, and the second weighs all tokens alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnlab.lens.toys.network import NOT_ASKED, fit, last_token_accuracy, small_decoder
from attnlab.models.skeletons.decoder import Decoder
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Pattern, Window
from attnlab.positions import Rotary

SYMBOLS, TASKS = 16, 8
SEPARATOR = 2 * SYMBOLS  # the token before each x; x is 0 … 15, f(x) is 16 … 31
VOCABULARY = 2 * SYMBOLS + 1


@dataclass(frozen=True)
class Prompts:
    """Prompts whose last token is the x that is asked for."""

    ids: Tensor  # (B, 3·shots + 2)
    answers: Tensor  # (B,)
    tasks: Tensor  # (B,): which permutation


def permutations() -> Tensor:
    """The eight permutations, `(TASKS, SYMBOLS)`: always the same, and no two alike at any symbol.

    They are rows of a shuffled Latin square, so that one example tells which is meant.
    """
    rng = torch.Generator().manual_seed(20)
    rows, columns, names = (torch.randperm(SYMBOLS, generator=rng) for _ in range(3))
    return names[(rows[:TASKS, None] + columns) % SYMBOLS]


def batch(size: int, *, shots: int = 8, task: int | None = None, seed: int | torch.Generator = 0) -> Prompts:
    """`size` prompts of `shots` examples each, of the permutation `task` or of any."""
    if shots < 0:
        raise ValueError(f"shots must be 0 or more, got {shots}")
    if task is not None and not 0 <= task < TASKS:
        raise ValueError(f"task must lie in 0 to {TASKS - 1}, got {task}")
    rng = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    tasks = torch.randint(TASKS, (size,), generator=rng) if task is None else torch.full((size,), task)
    ids, y = _tell(tasks, shots, rng)
    return Prompts(ids, y[:, -1], tasks)


def train(steps: int = 400, seed: int = 0, *, heads: int = 4, dim: int = 64, size: int = 32) -> Decoder:
    """A decoder of two layers that is right in 49 cases of 50 after eight examples: some 8 seconds on one core."""

    def mixer(layer: int) -> MultiHead:
        if layer == 0:
            return _Neighbour(dim, heads=heads, causal=True, position=Rotary(dim // heads, base=3.0))
        return _Average(dim, heads=heads, causal=True)

    model = small_decoder(VOCABULARY, dim=dim, heads=heads, hidden=256, seed=seed, mixer=mixer)

    def draw(shots: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        ids, y = _tell(torch.randint(TASKS, (size,), generator=rng), shots, rng)
        targets = torch.full_like(ids, NOT_ASKED)
        targets[:, 4::3] = y[:, 1:]
        return ids, targets

    fit(model, draw, steps=steps, levels=(8,), seed=seed)
    return model


def accuracy(model: torch.nn.Module, prompts: Prompts) -> float:
    """The share of prompts that are answered rightly."""
    return last_token_accuracy(model, prompts.ids, prompts.answers)


class _Neighbour(MultiHead):
    """Each token sees itself and the one before it."""

    def where(self, given: Pattern | None, offset: int, queries: int) -> Pattern | None:
        near = Window(2).starting_at(offset)
        there = super().where(given, offset, queries)
        return near if there is None else there & near


class _Average(MultiHead):
    """All tokens so far weigh the same."""

    def project(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(*arguments, **keywords)
        return torch.zeros_like(q), k, v


def _tell(tasks: Tensor, shots: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """`; x f(x) ; … ; x` with `shots + 1` pairs, the last f(x) left out, and the f(x) of each."""
    x = torch.randint(SYMBOLS, (len(tasks), shots + 1), generator=rng)
    y = permutations()[tasks].gather(1, x) + SYMBOLS
    return torch.stack((torch.full_like(x, SEPARATOR), x, y), -1).flatten(1)[:, :-1], y
