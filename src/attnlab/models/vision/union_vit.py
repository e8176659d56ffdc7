"""A plain vision transformer of union attention and union MLPs."""

from __future__ import annotations

from typing import Any

from attnlab.cards import BACKBONE, Card, register
from attnlab.models.skeletons.plain import Plain
from attnlab.nn.channel.union_mlp import UnionMLP
from attnlab.nn.sparse.union_attention import UnionAttention


@register(
    Card(
        name="union_vit",
        title="Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer",
        paper="2503.02495",
        family="sparse",
        kind=BACKBONE,
        cost="N² · (active / heads)²",
        sample=dict(dim=16, depth=2, heads=4, image=32, patch=8, num_classes=10),
        compiles="how many tokens each expert gets is read from data",
    )
)
class UnionViT(Plain):
    """A classifier of images whose patches choose the heads that see them and the slices of the MLPs that they pass.

        x = x + union_attention(norm x)        x = x + union_mlp(norm x)

    Images (B, in_channels, H, W) → logits (B, num_classes), over the mean of the tokens, with learned positions beside
    the rotary ones within each head's list. Source: arXiv 2503.02495.

    Args:
        heads, active: of `UnionAttention`.
        mlp_ratio, experts, active_experts: inner width of an MLP over `dim`, its slices, and how many a patch chooses.
        straight_through: the gates learn.
        plain: everything else is `Plain`'s.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int = 8,
        active: int | None = None,
        mlp_ratio: float = 4.0,
        experts: int = 4,
        active_experts: int = 2,
        straight_through: bool = False,
        dropout: float = 0.0,
        **plain: Any,
    ) -> None:
        super().__init__(
            dim=dim,
            depth=depth,
            mixer=lambda _: UnionAttention(
                dim, heads=heads, active=active, straight_through=straight_through, dropout=dropout
            ),
            dropout=dropout,
            **{"class_token": False, **plain},
        )
        blocks: list[Any] = list(self.encoder.blocks)
        for block in blocks:
            block.mlp = UnionMLP(
                dim, hidden=int(mlp_ratio * dim), experts=experts, active=active_experts,
                straight_through=straight_through, dropout=dropout,
            )  # fmt: skip
