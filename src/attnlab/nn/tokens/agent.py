"""Agent attention: a few agents, pooled from the queries, stand between queries and keys; the cost is linear in N."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import ANY_GRID, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.fused import linear
from attnlab.nn.kept import Kept
from attnlab.nn.mechanism import Mechanism, check_grid, check_heads, join_heads, split_heads
from attnlab.nn.spatial.attentive_conv import strips


class AgentBias(nn.Module):
    """What each agent prefers about each place of a grid: (1, heads, agents, [1 +] H·W).

        bias(agent, i, j) = resize(coarse)(i, j) + rows(i) + columns(j)

    `rows` and `columns` are learned on `grid` and, like `coarse` always is, resized linearly to any other. With a class
    token, its bias comes first.
    """

    def __init__(self, heads: int, agents: int, grid: tuple[int, int], *, coarse: int = 7, class_token: bool = False):
        super().__init__()
        self.coarse = nn.Parameter(torch.empty(heads, agents, coarse, coarse))
        self.rows = nn.Parameter(torch.empty(heads, agents, grid[0], 1))
        self.columns = nn.Parameter(torch.empty(heads, agents, 1, grid[1]))
        self.place = nn.Parameter(torch.empty(heads, agents, 1)) if class_token else None
        for table in self.parameters():
            nn.init.trunc_normal_(table, std=0.02)
        self._kept = Kept()

    def forward(self, grid: tuple[int, int], *, places_first: bool = False) -> Tensor:
        """With `places_first`, (1, heads, [1 +] H·W, agents)."""
        about = (grid, places_first)
        return self._kept(about, self.parameters(), lambda: self.on(grid).mT if places_first else self.on(grid))

    def on(self, grid: tuple[int, int]) -> Tensor:
        bias = _resize(self.coarse, grid) + _resize(self.rows, (grid[0], 1)) + _resize(self.columns, (1, grid[1]))
        bias = bias.flatten(2)
        return (bias if self.place is None else torch.cat((self.place, bias), dim=-1)).unsqueeze(0)


def cells(grid: tuple[int, int], side: int, like: Tensor) -> Tensor:
    """`(side², H·W)`: means over side × side even parts of a grid, overlapping where they do not divide it."""
    make = _cells if torch.compiler.is_compiling() else _kept_cells
    return make(grid, side, like.dtype, like.device)


def _cells(grid: tuple[int, int], side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept, it may be saved for a backward pass later
        down, across = (strips(n, side, torch.empty(0, dtype=dtype, device=device)) for n in grid)
        return torch.kron(down, across)


_kept_cells = lru_cache(maxsize=32)(_cells)


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return maps if maps.shape[2:] == size else F.interpolate(maps, size=size, mode="bilinear")


@register(
    Card(
        name="agent",
        title="Agent Attention: On the Integration of Softmax and Linear Attention",
        paper="2312.08874",
        system="agent_attention",
        family="tokens",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_GRID,
        cost="n N",
        growth=1.0,
        sample={"heads": 4, "agents": 9},
    )
)
class AgentAttention(Mechanism):
    """Gives every query a view of the whole grid for the price of `agents` keys.

        A = pool(Q)                                     agents: the projected queries, averaged over √n × √n cells
        Y = attend(A, K, V, bias=B1)                    agents read from all places   (aggregate)
        O = attend(Q, A, Y, bias=B2) + DWConv3×3(V)     places read from all agents   (broadcast)

    x (B, H·W, C) with grid=(H, W) → the same shape. This is linear attention φq(Q) (φk(K)ᵀ V) with the feature maps
    φq = softmax(QAᵀ + B2) and φk = softmax(AKᵀ + B1)ᵀ: a head's implied N×N matrix has rows summing to 1 and rank ≤ n.
    Cost: 4NC² + 4nNC + 9NC. Source: arXiv 2312.08874 (LeapLabTHU/Agent-Attention).

    One class serves the authors' three: DeiT's (`class_token=True`: x is (B, 1 + H·W, C); the class token, first, is
    neither pooled nor convolved), Swin's (a window is a grid; they accept the shift's mask and ignore it, so there is
    none here) and PVT's (`reduction=r`: keys and values come from an r times coarser map).

    Args:
        agents: their number n, a square.
        grid: the grid on which the biases are learned; on others they are resized (the authors have no others).
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        agents: int = 49,
        grid: tuple[int, int] = (14, 14),
        class_token: bool = False,
        reduction: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim)
        if causal:
            raise ValueError("causal must be False: agents read all places")
        check_heads(dim, heads)
        if agents < 1 or math.isqrt(agents) ** 2 != agents:
            raise ValueError(f"agents must be a square (1, 4, 9, …), got {agents}")
        if class_token and reduction > 1:
            raise ValueError(f"class_token=True goes with reduction=1 alone, got reduction={reduction}")
        self.heads, self.agents, self.class_token = heads, agents, class_token
        self.reduction, self.dropout = reduction, dropout
        self.wqkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.wo = nn.Linear(dim, dim)
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        if reduction > 1:
            self.reduce = nn.Conv2d(dim, dim, reduction, reduction)
            self.norm = nn.LayerNorm(dim)
        coarser = (grid[0] // reduction, grid[1] // reduction)
        self.aggregate = AgentBias(heads, agents, coarser, class_token=class_token)
        self.broadcast = AgentBias(heads, agents, grid, class_token=class_token)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Any = None,
        state: Any = None,
    ) -> Tensor:
        self.refuse(context=context, pattern=pattern, state=state)
        size, coarser = self._grids(x, grid)
        q, k, v, agents = self.project(x, size)
        dropout = self.dropout if self.training else 0.0
        read = attend(
            agents,
            split_heads(k, self.heads),
            split_heads(v, self.heads),
            bias=self.aggregate(coarser),
            dropout=dropout,
        )
        bias = self.broadcast(size, places_first=True)
        y = join_heads(attend(split_heads(q, self.heads), agents, read, bias=bias, dropout=dropout))
        first = int(self.class_token)
        local = self.local(_resize(_as_map(v[:, first:], coarser), size)).flatten(2).transpose(1, 2)
        return linear(y + (F.pad(local, (0, 0, 1, 0)) if first else local), self.wo)

    def project(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (B, N, C), k and v (B, M, C), and the agents (B, heads, n, C/heads)."""
        if self.reduction == 1:
            q, k, v = linear(x, self.wqkv).chunk(3, dim=-1)
        else:
            reduced = self.norm(self.reduce(_as_map(x, grid)).flatten(2).transpose(1, 2))
            widths = (self.dim, 2 * self.dim)
            weights = self.wqkv.weight.split(widths)
            biases = (None, None) if self.wqkv.bias is None else self.wqkv.bias.split(widths)
            q = F.linear(x, weights[0], biases[0])
            k, v = F.linear(reduced, weights[1], biases[1]).chunk(2, dim=-1)
        # A product, since pooling would reorder the map and the agents.
        agents = cells(grid, math.isqrt(self.agents), q) @ q[:, int(self.class_token) :]
        return q, k, v, split_heads(agents, self.heads)

    def factors(self, x: Tensor, *, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The two softmax matrices, to look at: broadcast (B, heads, N, n) and aggregate (B, heads, n, M)."""
        size, coarser = self._grids(x, grid)
        q, k, _, agents = self.project(x, size)
        scale = agents.shape[-1] ** -0.5
        aggregate = agents @ split_heads(k, self.heads).transpose(-2, -1) * scale + self.aggregate(coarser)
        broadcast = agents @ split_heads(q, self.heads).transpose(-2, -1) * scale + self.broadcast(size)
        return broadcast.softmax(-2).transpose(-2, -1), aggregate.softmax(-1)

    def _grids(self, x: Tensor, grid: tuple[int, ...] | None) -> tuple[tuple[int, int], tuple[int, int]]:
        """The grid of the places, and the coarser one of the keys."""
        self.check(x)
        height, width = check_grid(grid, x.shape[1] - int(self.class_token), axes=2)
        if height % self.reduction or width % self.reduction:
            raise ValueError(f"grid must be a multiple of reduction = {self.reduction} on each side, got {grid}")
        return (height, width), (height // self.reduction, width // self.reduction)


def _as_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    return x.transpose(1, 2).unflatten(2, grid)
