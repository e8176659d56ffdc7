"""cosFormer: linear attention whose weights fall with distance as a cosine does."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnlab.cards import ALL_FOUR, ANY_LENGTH, STREAMING, TOKENS, Card, register
from attnlab.nn.linear.linear_attention import LinearAttention


@register(
    Card(
        name="cosformer",
        title="cosFormer: Rethinking Softmax in Attention",
        paper="2202.08791",
        family="linear",
        kind=TOKENS,
        capabilities=ALL_FOUR | STREAMING | ANY_LENGTH,
        cost="N",
        growth=1.0,
        state="heads * 2 * head_dim * (head_dim + 1)",
        sample=dict(heads=4),
    )
)
class CosFormer(LinearAttention):
    """Linear attention that prefers what is near: the weight of a pair also falls with its distance.

        a_ij = relu(q_i)·relu(k_j) cos(π/2 · (i − j)/M)        y_i = Wo · Σ_j a_ij v_j / max(Σ_j a_ij, 1e-6)

    x (B, N, C) → (B, N, C), O(N · C · D): cos(a − b) = cos a cos b + sin a sin b makes two features of each. M is
    `length`; no pair may lie further apart, since its weight would be negative. Left out, it is the longer of x and
    context, as in the authors' code. Causal it would let a longer text change what its beginning gives, and could not
    be streamed: there it is 8,192 unless given, and best no more than a text has. The state is `(B, H, 2D, D + 1)`.
    Source: arXiv 2202.08791 (OpenNLPLab/cosFormer; Shark-NLP/CAB).
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        length: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, heads=heads, head_dim=head_dim, bias=bias, out_bias=out_bias, causal=causal)
        if length is not None and length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.length = 8192 if causal and length is None else length

    @property
    def width(self) -> int:
        return 2 * self.head_dim

    def features(self, x: Tensor) -> Tensor:
        return x.relu()

    def mapped(self, q: Tensor, k: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        longest = offset + max(q.shape[2], k.shape[2])
        if self.length is not None and longest > self.length:
            raise ValueError(f"x and context must not go beyond length={self.length} tokens, got {longest}")
        period = self.length or longest
        wide = torch.promote_types(q.dtype, torch.float32)
        angles = torch.arange(offset, longest, device=q.device, dtype=wide) * (math.pi / 2 / period)
        waves = angles.sin().unsqueeze(-1), angles.cos().unsqueeze(-1)

        def turned(x: Tensor) -> Tensor:
            x = self.features(x)
            return torch.cat([(x * wave[: x.shape[2]]).to(x.dtype) for wave in waves], -1)

        return turned(q), turned(k)

    def over(self, sums: Tensor, total: Tensor) -> Tensor:
        return sums / total.clamp_min(1e-6)
