"""The two ends of the arena's networks: how inputs become ordered tokens, and tokens an answer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Order(nn.Module):
    """Shows each token its predecessor: the second half of the channels comes from one place earlier (token shift).

    Mechanisms without positions cannot tell `ab` from `ba`. This gives all of them the same sense of order at any
    length and without parameters, so what is compared is how they reach further.      x (B, N, C) → (B, N, C)
    """

    def forward(self, x: Tensor) -> Tensor:
        here, before = x.chunk(2, -1)
        return torch.cat((here, F.pad(before, (0, 0, 1, 0))[:, :-1]), -1)


class Symbols(nn.Sequential):
    """From symbols (B, N) to ordered tokens (B, N, C)."""

    def __init__(self, vocabulary: int, width: int):
        table = nn.Embedding(vocabulary, width)
        nn.init.normal_(table.weight, std=0.1)
        super().__init__(table, Order())


class Values(nn.Sequential):
    """From numbers (B, N, inputs) to ordered tokens (B, N, C)."""

    def __init__(self, inputs: int, width: int):
        super().__init__(nn.Linear(inputs, width), Order())


class Patches(nn.Module):
    """From images (B, channels, H, W) to tokens (B, N, C): one per patch, which also sees a ring of its neighbours.

    The overlapping convolution that follows the patches is what tells tokens where they are, at any grid size.
    """

    def __init__(self, channels: int, width: int, patch: int = 1):
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch + 2, stride=patch, padding=1)
        self.place = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        return (x + self.place(x)).flatten(2).transpose(1, 2)


class MeanThenLinear(nn.Linear):
    """Averages the tokens and reads the classes off: (B, N, C) → (B, classes)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.mean(1))
