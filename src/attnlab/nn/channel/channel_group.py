"""Channel group attention (DaViT): the tokens are channels, each with the whole image as its feature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnlab.cards import ANY_LENGTH, NONCAUSAL_SELF, PERMUTATION_EQUIVARIANT, TOKENS, Card, register
from attnlab.nn.fused import linear
from attnlab.nn.mechanism import Mechanism, check_heads


@register(
    Card(
        name="channel_group",
        title="DaViT: Dual Attention Vision Transformers",
        paper="2204.03645",
        system="davit",
        family="channel",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | PERMUTATION_EQUIVARIANT | ANY_LENGTH,
        cost="N",
        growth=1.0,
        sample={"heads": 4},
    )
)
class ChannelGroupAttention(Mechanism):
    """Attention of channels to channels, in groups: every token's output depends on all places, in linear time.

        A = softmax(Kᵀ V / √D)          (D, D) for each group of D = C/H channels, over all N tokens; rows sum to 1
        y_n = Wo A q_n                  the channels of each token, mixed

    x (B, N, C) → the same shape, any N, places do not matter. As the authors have it, keys and values make the weights,
    and what they mix are the queries; the scale is that of a head's width, though the products run over N, so that the
    weights sharpen as the image grows. Cost: 4NC² + 2NCD. Source: arXiv 2204.03645 (dingmyu/davit).
    """

    def __init__(self, dim: int, *, heads: int = 8, bias: bool = True, causal: bool = False) -> None:
        if causal:
            raise ValueError("causal must be False: a channel is the whole sequence")
        super().__init__(dim)
        self.heads, self.head_dim = heads, check_heads(dim, heads)[1]
        self.wqkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.wo = nn.Linear(dim, dim)

    def weights(self, k: Tensor, v: Tensor) -> Tensor:
        """A (B, H, D, D) from keys and values (B, N, C)."""
        k, v = (t.unflatten(-1, (self.heads, -1)) for t in (k, v))
        scores = (k * self.head_dim**-0.5).permute(0, 2, 3, 1) @ v.transpose(1, 2)
        return scores.softmax(-1)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Any = None,
        state: Any = None,
    ) -> Tensor:
        self.check(x)
        self.refuse(context=context, pattern=pattern, state=state)
        q, k, v = linear(x, self.wqkv).chunk(3, dim=-1)
        weights = self.weights(k, v)
        if x.shape[1] < self.dim:
            heads = q.unflatten(-1, (self.heads, -1)).transpose(1, 2) @ weights.mT
            return self.wo(heads.transpose(1, 2).flatten(2))
        # With many tokens it pays to mix the rows of Wo instead: one product for all groups, and nothing to rearrange.
        mixed = weights.mT @ self.wo.weight.mT.unflatten(0, (self.heads, -1))
        return torch.baddbmm(self.wo.bias, q, mixed.flatten(1, 2))
