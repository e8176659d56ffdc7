"""Ways to make one vector of a frozen encoder's tokens, all called alike, to hold efficient probing against."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.models.skeletons.parts import MLP
from attnlab.models.skeletons.plain import TokenBlock
from attnlab.nn.cross.efficient_probing import EfficientProbing
from attnlab.nn.mechanism import check_heads, join_heads, split_heads
from attnlab.nn.multihead import MultiHead


class Mean(nn.Module):
    """The mean of all tokens: what a linear probe reads."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class First(Mean):
    """The first token: the encoder's own class token."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm of tokens (B, N, C), over images and tokens, without an affine map."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, affine=False, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).view_as(x)


class QueryPool(nn.Module):
    """One query reads all tokens by multi-head attention: x (B, N, C) → (B, C). The published poolings differ in what
    the query is, what is projected and what follows.

    Args:
        query: a learned one, or the tokens' mean.
        project: which of q, k, v and the output (o) have a map of their own.
        before, after: norms of the tokens and of what is read. joined: the query is among the keys.
        residual: add the query to what is read. mlp: a residual MLP behind it. scale: start of a scale per channel of
            both residual paths.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        query: Literal["learned", "mean"] = "learned",
        project: str = "qkvo",
        before: Callable[[int], nn.Module] | None = None,
        after: Callable[[int], nn.Module] | None = None,
        joined: bool = False,
        residual: bool = False,
        mlp: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.out_dim, self.heads, self.joined, self.residual = dim, heads, joined, residual
        self.query = nn.Parameter(0.02 * torch.randn(dim)) if query == "learned" else None
        self.maps = nn.ModuleDict({letter: nn.Linear(dim, dim, bias=letter == "o") for letter in project})
        self.before = before(dim) if before else nn.Identity()
        self.after = after(dim) if after else nn.Identity()
        self.mlp = nn.Sequential(nn.LayerNorm(dim), MLP(dim, 4 * dim)) if mlp else None
        self.scale = None if scale is None else nn.Parameter(torch.full((2, dim), scale))

    def _map(self, letter: str, x: Tensor) -> Tensor:
        return self.maps[letter](x) if letter in self.maps else x

    def forward(self, x: Tensor) -> Tensor:
        asked = x.mean(1, keepdim=True) if self.query is None else self.query.expand(len(x), 1, -1)
        seen = self.before(torch.cat((asked, x), 1) if self.joined else x)
        q, k, v = self._map("q", asked), self._map("k", seen), self._map("v", seen)
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        y = self._map("o", join_heads(attend(q, k, v)))
        first, second = (1.0, 1.0) if self.scale is None else self.scale
        if self.residual:
            y = asked + first * y
        if self.mlp is not None:
            y = y + second * self.mlp(y)
        return self.after(y)[:, 0]


class BlockPool(nn.Module):
    """A class token of its own through one transformer block with all tokens: x (B, N, C) → (B, C)."""

    def __init__(self, dim: int, *, heads: int = 8) -> None:
        super().__init__()
        self.out_dim = dim
        self.token = nn.Parameter(0.02 * torch.randn(dim))
        self.block = TokenBlock(dim, MultiHead(dim, heads=heads, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(torch.cat((self.token.expand(len(x), 1, -1), x), 1))[:, 0]


class GatedMean(nn.Module):
    """Multiple-instance attention (AbMILP, arXiv 1802.04712): Σ_n softmax_n(w tanh(V x_n)) x_n."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_dim = dim
        self.score = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.score(x).softmax(1).mT @ x)[:, 0]


class LocalDescriptor(nn.Module):
    """The spatial attention of DOLG (arXiv 2108.02927): the mean of softplus(w relu(y)) · y/|y|, y = norm(W x)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_dim = dim
        self.map, self.norm, self.score = nn.Linear(dim, dim), TokenBatchNorm(dim), nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.map(x))
        return (F.softplus(self.score(y.relu())) * F.normalize(y, dim=-1)).mean(1)


class ConvolutionalBlock(nn.Module):
    """CBAM (arXiv 1807.06521): gates on the channels, then on the places of `grid`, then the mean."""

    def __init__(self, dim: int, *, grid: tuple[int, int], reduction: int = 16, kernel: int = 7) -> None:
        super().__init__()
        self.out_dim, self.grid = dim, tuple(grid)
        self.mlp = MLP(dim, max(dim // reduction, 1), activation=nn.ReLU, bias=False)
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.grid[0] * self.grid[1]:
            raise ValueError(f"x must have the {self.grid} tokens of grid and no class token, got {x.shape[1]}")
        x = x * (self.mlp(x.mean(1)) + self.mlp(x.amax(1))).sigmoid()[:, None]
        two = torch.stack((x.mean(-1), x.amax(-1)), 1).unflatten(2, self.grid)
        return (x * self.norm(self.conv(two)).sigmoid().flatten(2).mT).mean(1)


# After their papers, each with its usual defaults; CLIP's without the learned positions, which fix a grid.
POOLINGS: dict[str, Callable[..., Any]] = {
    "mean": Mean,
    "first": First,
    "ep": EfficientProbing,
    "abmilp": GatedMean,
    "simpool": partial(QueryPool, heads=1, query="mean", project="qk", before=nn.LayerNorm),
    "clip": partial(QueryPool, query="mean", joined=True),
    "siglip": partial(QueryPool, mlp=True),
    "aim": partial(QueryPool, project="kv", before=TokenBatchNorm),
    "coca": partial(QueryPool, before=nn.LayerNorm, after=nn.LayerNorm),
    "cait": partial(QueryPool, before=nn.LayerNorm, joined=True, residual=True, mlp=True, scale=1e-5),
    "jepa": partial(QueryPool, before=nn.LayerNorm, residual=True, mlp=True),
    "cae": partial(QueryPool, before=nn.LayerNorm, residual=True, mlp=True, scale=0.1),
    "dino": BlockPool,
    "dolg": LocalDescriptor,
    "cbam": ConvolutionalBlock,
}


def pooling(name: str, dim: int, **options: Any) -> nn.Module:
    """The pooling `name` of tokens of `dim` channels: (B, N, dim) → (B, pooling.out_dim)."""
    if name not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {name!r}")
    return POOLINGS[name](dim, **options)
