"""L²ViT's linear attention: ReLU features, a learned scale, and a divisor that never falls below a constant."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnlab.cards import ALL_FOUR, ANY_LENGTH, PERMUTATION_EQUIVARIANT, STREAMING, TOKENS, Card, register
from attnlab.nn.linear.linear_attention import LinearAttention


@register(
    Card(
        name="clamped_linear",
        title="The Linear Attention Resurrection in Vision Transformer",
        paper="2501.16182",
        system="l2vit",
        family="linear",
        kind=TOKENS,
        capabilities=ALL_FOUR | STREAMING | ANY_LENGTH | PERMUTATION_EQUIVARIANT,
        cost="N",
        growth=1.0,
        state="heads * head_dim * (head_dim + 1)",
        sample={"heads": 4, "floor": 1.0},
    )
)
class ClampedLinearAttention(LinearAttention):
    """Linear attention that cannot blow up where nothing is alike: no epsilon, but a floor under the divisor.

        y_i = Wo τ Σ_j (relu(q_i)·relu(k_j)) v_j / max(Σ_j relu(q_i)·relu(k_j), floor)        τ learned, per head

    x (B, N, C) → (B, N, C), in all four uses, and streamed. Where the floor is reached the weights sum to less than τ,
    and to nothing where no key is alike. Cost: 4NC² + 4NCD. Source: arXiv 2501.16182 (ChuanyangZheng/L2ViT), whose
    floor is 100 and whose τ begins at D^-½.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        floor: float = 100.0,
        bias: bool = True,
        out_bias: bool = True,
        causal: bool = False,
    ) -> None:
        if floor <= 0:
            raise ValueError(f"floor must be positive, got {floor}")
        super().__init__(dim, heads=heads, bias=bias, out_bias=out_bias, causal=causal)
        self.floor = floor
        self.scale = nn.Parameter(torch.full((heads,), self.head_dim**-0.5))

    def features(self, x: Tensor) -> Tensor:
        return x.relu()

    def over(self, sums: Tensor, total: Tensor) -> Tensor:
        return sums * (self.scale[:, None, None] / total.clamp(min=self.floor))
