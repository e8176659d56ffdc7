"""Byte-level language modelling of the Python standard library's sources, or of your own text."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ends import Symbols
from ..task import Budget, Score, Task, digest_of, task

_NOT_THE_LIBRARY = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "__pycache__",
}


@task
class Text(Task):
    """Predict the next byte; whole modules are held out, so nothing of them was seen.

    Metric: bits per byte on held-out modules. Trivial: bytes counted in pairs (what a bigram table knows).
    """

    name = "text"
    title = "next byte of source code"
    metric = "bits per byte"
    reads = "text"
    positions = True
    budgets = {
        "small": Budget(parameters=120_000, depth=2, steps=800, batch=4, length=128, learning_rate=6e-3, examples=192),
        "medium": Budget(parameters=1_000_000, depth=4, steps=2_000, batch=16, length=256, examples=512),
    }

    def load(self) -> None:
        self.train, self.held_out = _standard_library() if self.data is None else _text(self.data)
        wanted = self.budget.length + 1
        if min(len(self.train), len(self.held_out)) < 2 * wanted:
            raise ValueError(
                f"data: {self.data} holds {len(self.train)} bytes to train on; at least {20 * wanted} are wanted"
            )

    def batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return self._windows(self.train, self.choose(rng, len(self.train) - self.budget.length))

    def stem(self, width: int) -> nn.Module:
        return Symbols(256, width)

    def head(self, width: int) -> nn.Module:
        return nn.Linear(width, 256)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def evaluate(self, predict: Callable[[Tensor], Tensor]) -> Score:
        starts = np.linspace(0, len(self.held_out) - self.budget.length - 1, self.budget.examples).astype(int)
        losses = []
        for part in np.array_split(starts, math.ceil(len(starts) / 32)):
            inputs, targets = self._windows(self.held_out, part)
            losses.append(F.cross_entropy(predict(inputs).transpose(1, 2).float(), targets, reduction="none"))
        bits = torch.cat(losses) / math.log(2)
        quarters = [chunk.mean().item() for chunk in bits.chunk(4, dim=1)]
        return Score(bits.mean().item(), {"bits per byte by quarter of the context": quarters})

    def trivial(self) -> tuple[str, float]:
        pairs = np.ones((256, 256)) * 0.1
        np.add.at(pairs, (self.train[:-1], self.train[1:]), 1)
        bits = -np.log2(pairs / pairs.sum(1, keepdims=True))
        return "byte pairs", float(bits[self.held_out[:-1], self.held_out[1:]].mean())

    def digest(self) -> str:
        return digest_of(self.train, self.held_out)

    def _windows(self, source: np.ndarray, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        pieces = torch.from_numpy(source[starts[:, None] + np.arange(self.budget.length + 1)].astype(np.int64))
        return pieces[:, :-1], pieces[:, 1:]


@lru_cache(maxsize=1)
def _standard_library() -> tuple[np.ndarray, np.ndarray]:
    """The sources that this Python came with, one module in ten held out (chosen by the hash of its name)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if _NOT_THE_LIBRARY.isdisjoint(inside.parts):
            module = inside.parts[0].removesuffix(".py")  # a package is held out as a whole
            held_out = hashlib.blake2b(module.encode(), digest_size=4).digest()[0] % 10 == 0
            parts[held_out].append(path.read_bytes())
    if not all(parts):
        raise FileNotFoundError(
            f"text: this Python has no library sources under {root}; point at a text file with --data"
        )
    return np.frombuffer(b"\n".join(parts[0]), np.uint8), np.frombuffer(b"\n".join(parts[1]), np.uint8)


def _text(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A text file, its last tenth held out."""
    if not path.is_file():
        raise FileNotFoundError(f"data: {path} is not a file; the task text reads one text file")
    everything = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    cut = len(everything) * 9 // 10
    return everything[:cut], everything[cut:]
