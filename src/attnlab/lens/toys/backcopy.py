"""Bigrams with back-copies: a task that leaves attention idle at most tokens, so that sinks form in a minute."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Backcopy:
    """Texts in which the next token depends on the last one alone, but after a trigger the token before it comes again.

    Attention is needed after triggers only, and has nothing to do elsewhere. Source: arXiv 2410.13835.

    Args:
        symbols: how many there are; the first `triggers` of them are triggers.
        length: tokens of a text.
        first: texts begin with a token of its own, number `symbols`, always the same.
        seed: of the chances of one symbol after another, softmax(1.5 · normal).
    """

    symbols: int = 32
    triggers: int = 3
    length: int = 48
    first: bool = True
    seed: int = 0
    chances: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.triggers < self.symbols:
            raise ValueError(f"triggers must be between 1 and symbols − 1 = {self.symbols - 1}, got {self.triggers}")
        if self.length < 3:
            raise ValueError(f"length must be at least 3, got {self.length}")
        rng = torch.Generator().manual_seed(self.seed)
        self.chances = (1.5 * torch.randn(self.symbols, self.symbols, generator=rng)).softmax(-1)

    @property
    def vocabulary(self) -> int:
        return self.symbols + self.first

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` texts `(count, length + 1)`, inputs and targets in one, and which inputs are triggers at work."""
        ids = torch.randint(self.symbols, (count, self.length + 1), generator=generator)
        if self.first:
            ids[:, 0] = self.symbols
        trigger = torch.zeros(count, self.length, dtype=torch.bool)
        for n in range(int(self.first), self.length):
            drawn = torch.multinomial(self.chances[ids[:, n]], 1, generator=generator)[:, 0]
            if n > self.first:
                trigger[:, n] = ids[:, n] < self.triggers
                drawn = torch.where(trigger[:, n], ids[:, n - 1], drawn)
            ids[:, n + 1] = drawn
        return ids, trigger
