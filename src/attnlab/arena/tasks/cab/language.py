"""Language modelling, masked (noncausal self) and from left to right (causal self)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.arena.ends import Symbols
from attnlab.arena.task import CAUSAL, SELF, Budget, Score, task
from attnlab.arena.tasks.cab.base import MEDIUM, PAPER, TINY, CabTask
from attnlab.arena.tasks.cab.parts import Places, table
from attnlab.arena.tasks.cab.vocabulary import read_tokens
from attnlab.arena.tasks.text import _standard_library

_MASKED = 0.15  # of the tokens; of these 8 in 10 are hidden, 1 in 10 is another, 1 stays


class _Language(CabTask):
    """Bytes of the standard library's sources, or GPT-2's tokens of PG-19."""

    metric = "perplexity"
    signs = {"perplexity": -1}
    folder = "pg19"
    source = (
        "PG-19 as CAB prepares it: train.txt.tokens, valid.txt.tokens and test.txt.tokens, GPT-2's tokens separated by "
        "spaces, a line of text each (https://github.com/deepmind/pg19)"
    )
    positions = True
    held_out_part = "test"

    def make(self) -> None:
        self.train, self.held_out = _standard_library()
        self.symbols = 256

    def read(self, root: Path) -> None:
        paths = [self.find(root, f"{part}.txt.tokens") for part in ("train", self.held_out_part)]
        self.train, self.held_out, self.symbols = read_tokens(*paths)
        for path, tokens in zip(paths, (self.train, self.held_out), strict=True):
            if len(tokens) < self.budget.length + 2:
                raise ValueError(f"data: {path} holds {len(tokens)} tokens; {self.budget.length + 2} are wanted")

    def arrays(self) -> list[np.ndarray | bytes]:
        return [self.train, self.held_out]

    def head(self, width: int) -> nn.Module:
        return nn.Linear(width, self.symbols)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.asked(self._windows(self.train, self.choose(rng, len(self.train) - self.budget.length)), rng)

    def evaluate(self, predict: Callable[[Tensor], Tensor]) -> Score:
        """exp of the mean loss per predicted token, over windows side by side through the held-out text."""
        count = min(self.budget.examples, (len(self.held_out) - 1) // self.budget.length)
        starts = np.linspace(0, len(self.held_out) - self.budget.length - 1, count).astype(int)
        rng, total, number = torch.Generator().manual_seed(7), 0.0, 0
        for part in np.array_split(starts, math.ceil(count / 16)):
            inputs, targets = self.asked(self._windows(self.held_out, part), rng)
            known = targets >= 0
            total += F.cross_entropy(predict(inputs)[known].float(), targets[known], reduction="sum").item()
            number += int(known.sum())
        return self.scored(math.exp(min(total / number, 50.0)))

    def trivial(self) -> tuple[str, float]:
        counts = np.bincount(self.train, minlength=self.symbols) + 0.1
        loss = -np.log(counts / counts.sum())[self.held_out].mean()
        return "frequencies", float(math.exp(loss))

    def asked(self, windows: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets of windows (B, length + 1)."""
        raise NotImplementedError

    def _windows(self, source: np.ndarray, starts: np.ndarray) -> Tensor:
        pieces = source[starts[:, None] + np.arange(self.budget.length + 1)]
        return torch.from_numpy(pieces.astype(np.int64))


@task
class LM(_Language):
    """Predict the next token. Published: GPT-2 on PG-19 at length 8,192."""

    name, title, about, layout = "cab-lm-cs", "next token of a text", "LM", CAUSAL
    budgets = {
        TINY: Budget(parameters=100_000, depth=2, steps=300, batch=8, length=128, learning_rate=6e-3, examples=96),
        MEDIUM: Budget(parameters=3_000_000, depth=6, steps=5_000, batch=8, length=1024, learning_rate=2e-3),
        PAPER: Budget(
            parameters=124_000_000, depth=12, steps=125_000, batch=16, length=8192, learning_rate=5e-4, examples=10**6
        ),
    }

    def stem(self, width: int) -> nn.Module:
        return Symbols(self.symbols, width)

    def asked(self, windows: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return windows[:, :-1], windows[:, 1:]


@task
class MLM(_Language):
    """Say what was hidden. Published: RoBERTa on PG-19 at length 2,048, scored on its validation books."""

    name, title, about, layout = "cab-mlm-ns", "hidden tokens of a text", "MLM", SELF
    held_out_part = "valid"
    budgets = {
        TINY: Budget(parameters=100_000, depth=2, steps=250, batch=8, length=128, learning_rate=6e-3, examples=128),
        MEDIUM: Budget(parameters=3_000_000, depth=6, steps=5_000, batch=16, length=512, learning_rate=2e-3),
        PAPER: Budget(
            parameters=125_000_000, depth=12, steps=125_000, batch=256, length=2048, learning_rate=3e-4, examples=10**6
        ),
    }

    def stem(self, width: int) -> nn.Module:
        return nn.Sequential(table(self.symbols + 1, width), Places())

    def asked(self, windows: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        truth = windows[:, :-1]
        chosen, how = torch.rand(truth.shape, generator=rng) < _MASKED, torch.rand(truth.shape, generator=rng)
        other = torch.randint(self.symbols, truth.shape, generator=rng)
        inputs = torch.where(how < 0.8, self.symbols, torch.where(how < 0.9, other, truth))
        return torch.where(chosen, inputs, truth), torch.where(chosen, truth, -1)
