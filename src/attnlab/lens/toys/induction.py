"""A random text told twice: what follows is what followed last time.

The circuit: a previous-token head in the first layer, and induction heads in the second, which look from a token at the
one that came after its first occurrence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.lens.toys.network import NOT_ASKED, fit, last_token_accuracy, small_decoder
from attnlab.models.skeletons.decoder import Decoder

VOCABULARY = 32
LENGTH = 12


@dataclass(frozen=True)
class Prompts:
    """The first telling, and the second up to a token somewhere in it."""

    ids: Tensor  # (B, length + told again)
    answers: Tensor  # (B,)
    places: Tensor  # (B,): where in the first telling the answer stands


def batch(size: int, *, length: int = LENGTH, again: int = 6, seed: int | torch.Generator = 0) -> Prompts:
    """`size` prompts: `length` different tokens, and the first `again` of them once more."""
    if not 1 <= again < length <= VOCABULARY:
        raise ValueError(f"again < length ≤ {VOCABULARY} must hold, got again = {again}, length = {length}")
    rng = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    told = _tokens(size, length, rng)
    return Prompts(torch.cat((told, told[:, :again]), 1), told[:, again], torch.full((size,), again))


def train(steps: int = 250, seed: int = 0, *, heads: int = 4, dim: int = 64, size: int = 32) -> Decoder:
    """A decoder of two layers that tells 12 tokens again without an error: some 5 seconds on one core."""
    model = small_decoder(VOCABULARY, dim=dim, heads=heads, seed=seed)

    def draw(length: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        told = _tokens(size, length, rng)
        ids = torch.cat((told, told[:, :-1]), 1)
        targets = torch.full_like(ids, NOT_ASKED)
        targets[:, length:] = told[:, 1:]
        return ids, targets

    fit(model, draw, steps=steps, levels=range(3, LENGTH + 1, 3), seed=seed)
    return model


def accuracy(model: torch.nn.Module, prompts: Prompts) -> float:
    """The share of prompts that are continued rightly."""
    return last_token_accuracy(model, prompts.ids, prompts.answers)


def _tokens(size: int, length: int, rng: torch.Generator) -> Tensor:
    return torch.rand(size, VOCABULARY, generator=rng).argsort(1)[:, :length]
