"""The parts of the benchmark's networks beside the mechanism on trial: places, and softmax attention elsewhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attnlab.models.skeletons.plain import TokenBlock
from attnlab.nn.multihead import MultiHead


class Places(nn.Module):
    """Adds to each token the waves of its place (arXiv 1706.03762), so that all mechanisms know the order.

    x (B, N, C) → (B, N, C), place i: 0.3 · (sin, cos)(i / 10000^(2c/C)), as large as embeddings are. No parameters.
    """

    def __init__(self, scale: float = 0.3):
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[2] // 2
        rates = torch.exp(torch.arange(half, device=x.device) * (-math.log(10_000.0) / half))
        turns = torch.arange(x.shape[1], device=x.device)[:, None] * rates
        return x + self.scale * torch.cat((turns.sin(), turns.cos()), -1).to(x.dtype)


class Softmax(nn.Sequential):
    """A block of softmax attention and an MLP, for the places that are not on trial: (B, N, C) → (B, N, C)."""

    def __init__(self, width: int, *, causal: bool = False):
        mixer = MultiHead(width, heads=max(1, width // 16), causal=causal)
        super().__init__(TokenBlock(width, mixer, mlp_ratio=1.0, norm=nn.RMSNorm))


def table(symbols: int, width: int) -> nn.Embedding:
    """Embeddings as large as those of the other tasks."""
    made = nn.Embedding(symbols, width)
    nn.init.normal_(made.weight, std=0.1)
    return made
