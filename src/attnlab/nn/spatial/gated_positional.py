"""Gated positional self-attention (ConViT): heads that begin as a convolution and may leave the neighbourhood."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import ANY_GRID, EXACT, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.mechanism import OnGrid, check_grid
from attnlab.nn.multihead import MultiHead


def _all_content(dim: int, grid: tuple[int, ...]) -> GatedPositionalAttention:
    module = GatedPositionalAttention(dim, heads=4, bias=True)
    nn.init.constant_(module.gate, -math.inf)
    return module


@register(
    Card(
        name="gated_positional",
        title="ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
        paper="2103.10697",
        system="convit",
        family="spatial",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_GRID | EXACT,
        cost="N²",
        growth=2.0,
        sample={"heads": 4},
        limit=_all_content,
    )
)
class GatedPositionalAttention(OnGrid, MultiHead):
    """Each head weighs what it sees by content and by place, and a gate says how much of each.

        y = Wo [(1 − σ(λ)) · softmax(q·k/√D) v + σ(λ) · softmax(P) v]
        P_ij = a Δx + b Δy + c (Δx² + Δy²)        Δ = place of key j − place of query i;  a, b, c, λ per head

    x (B, H·W, C) with grid=(H, W) → the same. As built, head (p, q) of the ⌊√heads⌋ × ⌊√heads⌋ first ones attends
    around the offset (p, q) from the centre, α = `locality` sharp, so the layer begins near a convolution with kernel
    ⌊√heads⌋ (equal to one as α → ∞ and λ → ∞); with λ → −∞ it is plain attention. Source: arXiv 2103.10697.

    P is a sum of a part of Δx and a part of Δy, so softmax(P) is a product of one matrix for columns and one for rows:
    the positional half costs N (H + W) C instead of N² C, and the content half goes to a fused kernel. Cost: 2N²C in
    all. The authors divide the mixed weights by their sum, which is 1, and give P a bias, which the softmax cancels: it
    is here (`position.bias`, not trained) so that their checkpoints load.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        locality: float = 1.0,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads=heads, bias=bias, out_bias=True, dropout=dropout)
        if causal:
            raise ValueError("causal must be False: the positional weights look to every side")
        self.position_logits = nn.Linear(3, heads)  # a, b, c
        self.position_logits.bias.requires_grad_(False)
        self.gate = nn.Parameter(torch.ones(heads))
        self.init_weights(locality)

    def init_weights(self, locality: float = 1.0) -> None:
        """The start of the paper: values pass as they are, heads look at the places of a kernel, gates at σ(1)."""
        for layer in (self.wqkv, self.wo, self.position_logits):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        side = math.isqrt(self.heads)
        centre = (side - 1) / 2 if side % 2 == 0 else side // 2
        with torch.no_grad():
            self.wqkv.weight[2 * self.dim :].copy_(torch.eye(self.dim))
            self.gate.fill_(1.0)
            for head in range(side * side):
                across, down = head // side - centre, head % side - centre
                self.position_logits.weight[head] = locality * torch.tensor((2 * across, 2 * down, -1.0))

    def position_weights(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Rows' and columns' factors of softmax(P): `(heads, H, H)` and `(heads, W, W)`."""
        factors = []
        for axis, length in enumerate(grid):
            place = torch.arange(length, device=self.gate.device, dtype=self.gate.dtype)
            offset = place - place[:, None]
            linear, square = self.position_logits.weight[:, 1 - axis], self.position_logits.weight[:, 2]
            factors.append((linear[:, None, None] * offset + square[:, None, None] * offset.square()).softmax(-1))
        return factors[0], factors[1]

    def over_grid(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        height, width = grid
        if self.training and self.dropout:
            v = self.qkv(x)[2]
            return self.merge(F.dropout(self.weights(x, grid=grid), self.dropout) @ v)
        q, k, v = self.qkv(x)
        rows, columns = self.position_weights((height, width))
        maps = v.reshape(*v.shape[:2], height, -1)  # (B, heads, H, W·D)
        placed = (columns[:, None] @ (rows @ maps).unflatten(-1, (width, -1))).flatten(2, 3)
        gate = self.gate.sigmoid()[:, None, None]
        return self.merge(torch.lerp(attend(q, k, v), placed, gate))

    def weights(self, x: Tensor, context: Tensor | None = None, **keywords: Any) -> Tensor:
        """The weights `(B, heads, N, N)` with which values are mixed: to look at, or to drop from."""
        self.refuse(context=context)
        height, width = check_grid(keywords["grid"], x.shape[1], axes=2)
        q, k, _ = self.qkv(x)
        content = (q @ k.mT * self.head_dim**-0.5).softmax(-1)
        rows, columns = self.position_weights((height, width))
        placed = (rows[:, :, None, :, None] * columns[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)
        return torch.lerp(content, placed, self.gate.sigmoid()[:, None, None])

    def non_locality(self, x: Tensor, *, grid: tuple[int, int]) -> Tensor:
        """How far each head looks, in places: Σ_j A_ij |j − i|, averaged over queries and batch; `(heads,)`."""
        return mean_distance(self.weights(x, grid=grid), grid)


def mean_distance(weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mean distance over a grid, in places, from a query to what it weighs: (B, heads, N, N) → (heads,)."""
    height, width = grid
    place = torch.arange(height * width, device=weights.device)
    place = torch.stack((place // width, place % width), -1).to(weights)
    return (weights.mean(0) * torch.cdist(place, place)).sum(-1).mean(-1)
