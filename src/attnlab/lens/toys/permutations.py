"""Tasks told by examples: `x f(x) x f(x) … x`, where f is one of eight permutations; say f(x).

The permutations are learned by heart; which of them is meant, only the examples say. Without any, the best guess is
right in one case of eight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.lens.toys.network import NOT_ASKED, fit, last_token_accuracy, small_decoder
from attnlab.models.skeletons.decoder import Decoder

SYMBOLS, TASKS = 16, 8
BEGIN = 2 * SYMBOLS  # the token that every prompt begins with; x is 0 … 15, f(x) is 16 … 31
VOCABULARY = 2 * SYMBOLS + 1


@dataclass(frozen=True)
class Prompts:
    """Prompts whose last token is the x that is asked for."""

    ids: Tensor  # (B, 1 + 2·shots + 1)
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
    return Prompts(ids[:, :-1], y[:, -1], tasks)


def train(steps: int = 500, seed: int = 0, *, heads: int = 4, dim: int = 64, size: int = 32) -> Decoder:
    """A decoder of two layers that is right after two examples nearly always: some 8 seconds on one core."""
    model = small_decoder(VOCABULARY, dim=dim, heads=heads, hidden=256, seed=seed)

    def draw(shots: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        ids, y = _tell(torch.randint(TASKS, (size,), generator=rng), shots, rng)
        targets = torch.full_like(ids[:, :-1], NOT_ASKED)
        targets[:, 1::2] = y
        return ids[:, :-1], targets

    fit(model, draw, steps=steps, levels=(8,), seed=seed)
    return model


def accuracy(model: torch.nn.Module, prompts: Prompts) -> float:
    """The share of prompts that are answered rightly."""
    return last_token_accuracy(model, prompts.ids, prompts.answers)


def _tell(tasks: Tensor, shots: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """`BEGIN x f(x) …` with `shots + 1` pairs, and the f(x) of each."""
    x = torch.randint(SYMBOLS, (len(tasks), shots + 1), generator=rng)
    y = permutations()[tasks].gather(1, x) + SYMBOLS
    begin = torch.full((len(tasks), 1), BEGIN)
    return torch.cat((begin, torch.stack((x, y), -1).flatten(1)), 1), y
