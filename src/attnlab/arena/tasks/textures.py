"""Telling brick, grass and gravel apart from small patches."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ends import MeanThenLinear, Patches
from ..task import GRID, Budget, Score, Task, digest_of, need, task

_NAMES = ("brick", "grass", "gravel")
_PATCH = 4  # pixels per token and axis
_NOISE = 0.7  # standard deviations of noise laid over each view, or every mechanism would be right every time


@task
class Textures(Task):
    """Which of scikit-image's textures does this small, noisy view show?

    Views are turned and mirrored at random and brought to mean 0 and deviation 1: brightness and contrast say nothing.
    The right quarter of each photograph is held out. Trivial: guess.
    """

    name = "textures"
    title = "brick, grass or gravel from a small noisy view"
    metric = "accuracy"
    better = "higher"
    layout = GRID
    extra = "data"
    budgets = {
        "small": Budget(parameters=60_000, depth=2, steps=100, batch=32, length=64, examples=384),
        "medium": Budget(parameters=400_000, depth=4, steps=1_000, batch=32, length=256, examples=768),
    }

    def load(self) -> None:
        self.photographs = _photographs()
        self.size = _PATCH * round(self.budget.length**0.5)
        self.edge = self.photographs.shape[2] * 3 // 4

    def batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return self._views(rng, self.budget.batch, 0, self.edge)

    def stem(self, width: int) -> nn.Module:
        return Patches(1, width, _PATCH)

    def head(self, width: int) -> nn.Module:
        return MeanThenLinear(width, len(_NAMES))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def evaluate(self, predict: Callable[[Tensor], Tensor]) -> Score:
        rng = torch.Generator().manual_seed(5)
        views, labels = self._views(rng, self.budget.examples, self.edge, self.photographs.shape[2])
        right = torch.cat([predict(part).argmax(-1) for part in views.split(64)]) == labels
        by_name = {name: right[labels == i].double().mean().item() for i, name in enumerate(_NAMES)}
        return Score(right.double().mean().item(), {"accuracy by texture": by_name})

    def trivial(self) -> tuple[str, float]:
        return "guess", 1 / len(_NAMES)

    def grid(self, length: int) -> tuple[int, int]:
        side = round(length**0.5)
        return side, side

    def digest(self) -> str:
        return digest_of(self.photographs)

    def _views(self, rng: torch.Generator, count: int, left: int, right: int) -> tuple[Tensor, Tensor]:
        """`count` views between the columns `left` and `right`: images (count, 1, size, size) and their labels."""
        size, (_, height, _) = self.size, self.photographs.shape
        labels = torch.randint(len(_NAMES), (count,), generator=rng)
        rows = torch.randint(height - size + 1, (count,), generator=rng)
        columns = left + torch.randint(right - left - size + 1, (count,), generator=rng)
        turns = torch.randint(8, (count,), generator=rng)
        views = [
            _turned(self.photographs[label, row : row + size, column : column + size], turn)
            for label, row, column, turn in zip(*(x.tolist() for x in (labels, rows, columns, turns)), strict=True)
        ]
        images = torch.from_numpy(np.stack(views))[:, None]
        std, mean = torch.std_mean(images, dim=(2, 3), keepdim=True)
        return (images - mean) / (std + 1e-4) + _NOISE * torch.randn(images.shape, generator=rng), labels


def _turned(view: np.ndarray, turn: int) -> np.ndarray:
    """One of the eight ways a square lies on a table."""
    return np.ascontiguousarray(np.rot90(view if turn < 4 else view.T, turn % 4))


@lru_cache(maxsize=1)
def _photographs() -> np.ndarray:
    data = need("skimage.data", "data", "the task textures")
    return np.stack([getattr(data, name)() for name in _NAMES]).astype(np.float32) / 255
