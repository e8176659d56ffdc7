"""A classifier of long sequences made of union attention and union MLPs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnlab.cards import OPERATOR, Card, register
from attnlab.models.skeletons.plain import Encoder, Positions
from attnlab.nn.channel.union_mlp import UnionMLP
from attnlab.nn.sparse.union_attention import UnionAttention


@register(
    Card(
        name="union_classifier",
        title="Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer",
        paper="2503.02495",
        family="language",
        kind=OPERATOR,
        cost="N² · (active / heads)²",
        compiles="how many tokens each expert gets is read from data",
        exports="how many tokens each expert gets is read from data",
    )
)
class UnionClassifier(nn.Module):
    """Sequences of symbols to classes, as in the Long Range Arena: ids (B, N) → logits (B, classes).

        x = embedding + places;  x = x + union_attention(norm x);  x = x + union_mlp(norm x)
        logits = W₂ relu(W₁ mean x)

    Norms are RMS. Any N: places are interpolated for another than `length`. The defaults are those of the authors'
    script: a token chooses one of two heads and two of four slices. Their heads leave half of their channels unturned;
    here all are turned. Source: arXiv 2503.02495 (YujiaoYang-work/UoE).

    Args:
        vocabulary, length, classes: numbers of symbols, of places, of classes.
        heads, active: of `UnionAttention`.
        hidden, experts, active_experts: inner width of an MLP, its slices, and how many a token chooses.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 512,
        length: int = 4096,
        classes: int = 2,
        dim: int = 64,
        depth: int = 2,
        heads: int = 2,
        active: int | None = None,
        hidden: int = 128,
        experts: int = 4,
        active_experts: int = 2,
        straight_through: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        gates: dict[str, Any] = dict(straight_through=straight_through, dropout=dropout)
        self.embedding = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.places, self.dropout = Positions((length,), dim), nn.Dropout(dropout)
        self.encoder = Encoder(
            dim=dim, depth=depth, norm=nn.RMSNorm,
            mixer=lambda _: UnionAttention(dim, heads=heads, active=active, **gates),
        )  # fmt: skip
        blocks: list[Any] = list(self.encoder.blocks)
        for block in blocks:
            block.mlp = UnionMLP(dim, hidden=hidden, experts=experts, active=active_experts, **gates)
        self.head = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, ids: Tensor) -> Tensor:
        if ids.dim() != 2 or 0 in ids.shape:
            raise ValueError(f"ids must have shape (B, N), not empty, got {tuple(ids.shape)}")
        if ids.is_floating_point() or ids.dtype is torch.bool:
            raise TypeError(f"ids must be integers, got {ids.dtype}")
        x = self.dropout(self.places(self.embedding(ids), grid=(ids.shape[1],)))
        return self.head(self.encoder(x).mean(1))
