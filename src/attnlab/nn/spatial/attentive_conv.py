"""Attentive convolution (ATConv): a depth-wise convolution whose kernels the map itself writes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, FEATURES, NONCAUSAL_SELF, TOKENS, Card, register
from attnlab.nn.depthwise import depthwise
from attnlab.nn.fused import linear
from attnlab.nn.mechanism import OnGrid


def strips(places: int, count: int, like: Tensor) -> Tensor:
    """`(count, places)`: means over `count` even parts of a row of places, overlapping where they do not divide it."""
    at, part = torch.arange(places, device=like.device), torch.arange(count, device=like.device)
    begin, end = part * places // count, -(-(part + 1) * places // count)
    inside = (at >= begin[:, None]) & (at < end[:, None])
    return inside.to(like.dtype) / (end - begin).to(like.dtype)[:, None]


@register(
    Card(
        name="atconv",
        title="Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency",
        paper="2510.20092",
        system="atconv",
        family="spatial",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
    )
)
class AttentiveConv(nn.Module):
    """A convolution instead of attention, with one kernel per image and channel, made from the whole map.

        K = Wg gelu(Wk pool(x))              pool: means over k² strips of the places in raster order, not over cells
        K ← K - σ(d) · mean(K)               lateral inhibition, d learned per channel, at first ½ of the mean
        y = Wo (K ∗ Wv x)                    depth-wise cross-correlation, zeros beyond the border; no softmax, no norm

    `(B, C, H, W)` to the same, any size. Wg (k², k²) is shared by all channels. Pooling comes before Wk, which is the
    same and spares N·C² of the cost: N·C·(2C + 2k²). Fastest on channels-last memory. Source: arXiv 2510.20092
    (price112/Attentive-Convolution). The authors exempt d (`inhibition`) from weight decay.

    Args:
        kernel: k, odd. approximate: of the GELU; "tanh" in the authors' diffusion transformers.
    """

    def __init__(self, dim: int, *, kernel: int = 3, bias: bool = True, approximate: str = "none") -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, to keep the map's size, got {kernel}")
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate must be none or tanh, got {approximate!r}")
        self.dim, self.kernel, self.approximate = dim, kernel, approximate
        self.wk = nn.Linear(dim, dim, bias=bias)
        self.wg = nn.Linear(kernel**2, kernel**2, bias=bias)
        self.wv = nn.Linear(dim, dim, bias=bias)
        self.wo = nn.Linear(dim, dim, bias=bias)
        self.inhibition = nn.Parameter(torch.zeros(dim))

    def kernels(self, tokens: Tensor) -> Tensor:
        """The kernels `(B, C, k²)` that the map's places `(B, N, C)` write, inhibited."""
        means = strips(tokens.shape[1], self.kernel**2, tokens) @ tokens
        made = self.wg(F.gelu(self.wk(means), approximate=self.approximate).mT)
        return made - self.inhibition.sigmoid()[:, None] * made.mean(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        x = x.permute(0, 2, 3, 1)
        weight = self.kernels(x.flatten(1, 2)).flatten(0, 1).unflatten(1, (1, self.kernel, self.kernel))
        # Images side by side as channels, so that one convolution has all their kernels, in channels-last memory.
        v = linear(x.permute(1, 2, 0, 3), self.wv).flatten(2)
        y = depthwise(v.permute(2, 0, 1)[None], weight)
        return linear(y[0].permute(1, 2, 0).unflatten(2, (len(x), -1)), self.wo).permute(2, 3, 0, 1)


@register(
    Card(
        name="atconv_tokens",
        title="Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency",
        paper="2510.20092",
        system="atconv",
        family="spatial",
        kind=TOKENS,
        capabilities=NONCAUSAL_SELF | ANY_GRID,
        cost="N",
        growth=1.0,
    )
)
class AttentiveConvTokens(OnGrid):
    """`AttentiveConv` over tokens `(B, N, C)` on `grid`, in the place of attention: what SiT-ATConv mixes with.

    Cost: N·C·(2C + 2k²). Source: arXiv 2510.20092. The GELU is the tanh approximation, as in the authors' models.
    """

    def __init__(
        self, dim: int, *, kernel: int = 3, bias: bool = True, approximate: str = "tanh", causal: bool = False
    ) -> None:
        if causal:
            raise ValueError("causal must be False: the kernels are made from the whole grid")
        super().__init__(dim)
        self.conv = AttentiveConv(dim, kernel=kernel, bias=bias, approximate=approximate)

    def over_grid(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.conv(x.unflatten(1, grid).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
