"""Images of digits, pixel by pixel: what comes next on a map that is read row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ends import Symbols
from ..task import CAUSAL_GRID, Budget, Score, Task, digest_of, need, task

_LEVELS, _SIDE = 17, 8
_START = _LEVELS  # stands before the first pixel


class Placed(Symbols):
    """Symbols (B, N) as tokens (B, N, C) that know their place on the map."""

    def __init__(self, width: int):
        super().__init__(_LEVELS + 1, width)
        self.place = nn.Parameter(0.1 * torch.randn(_SIDE**2, width))

    def forward(self, symbols: Tensor) -> Tensor:
        return super().forward(symbols) + self.place[: symbols.shape[1]]


@task
class Pixels(Task):
    """Predict the next pixel of scikit-learn's digits, 8 × 8 in 17 shades, the last third of the images held out.

    The one task of a causal map: axial and neighborhood attention take part with what they know of rows and columns.
    Metric: bits per pixel. Trivial: how often each pixel has each shade.
    """

    name = "pixels"
    title = "next pixel of digits"
    metric = "bits per pixel"
    layout = CAUSAL_GRID
    extra = "data"
    budgets = {
        "small": Budget(parameters=60_000, depth=2, steps=300, batch=16, length=64, learning_rate=6e-3, examples=256),
        "medium": Budget(parameters=300_000, depth=4, steps=2_000, batch=32, length=64, examples=599),
    }

    def load(self) -> None:
        self.train, self.held_out = _digits()

    def batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return _shifted(self.train[self.choose(rng, len(self.train))])

    def stem(self, width: int) -> nn.Module:
        return Placed(width)

    def head(self, width: int) -> nn.Module:
        return nn.Linear(width, _LEVELS)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def evaluate(self, predict: Callable[[Tensor], Tensor]) -> Score:
        losses = []
        for images in np.array_split(self.held_out[: self.budget.examples], 8):
            inputs, targets = _shifted(images)
            losses.append(F.cross_entropy(predict(inputs).transpose(1, 2).float(), targets, reduction="none"))
        bits = torch.cat(losses).mean(0) / math.log(2)
        return Score(bits.mean().item(), {"bits per pixel by row": bits.view(_SIDE, _SIDE).mean(1).tolist()})

    def trivial(self) -> tuple[str, float]:
        counts = np.stack([np.bincount(column, minlength=_LEVELS) + 0.1 for column in self.train.T])
        bits = -np.log2(counts / counts.sum(1, keepdims=True))
        held_out = self.held_out[: self.budget.examples]
        return "shades by place", float(bits[np.arange(_SIDE**2), held_out].mean())

    def grid(self, length: int) -> tuple[int, int]:
        return _SIDE, _SIDE

    def digest(self) -> str:
        return digest_of(self.train, self.held_out)


def _shifted(images: np.ndarray) -> tuple[Tensor, Tensor]:
    targets = torch.from_numpy(images)
    return F.pad(targets[:, :-1], (1, 0), value=_START), targets


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    data = need("sklearn.datasets", "data", "the task pixels").load_digits().data.astype(np.int64)
    cut = len(data) * 2 // 3
    return data[:cut], data[cut:]
