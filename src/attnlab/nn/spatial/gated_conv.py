"""Recursive gated convolution (gnConv, HorNet): products of a chosen number of places, without any pairwise score."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, FEATURES, Card, register
from attnlab.nn.depthwise import DepthwiseConv, depthwise
from attnlab.nn.fused import linear, product


@register(
    Card(
        name="global_local_filter",
        title="HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions",
        paper="2207.14284",
        family="spatial",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N log N",
    )
)
class GlobalLocalFilter(nn.Module):
    """One half of the channels sees the 3×3 places around each, the other the whole map through its spectrum.

        a, b = norm(x) in two;  y = norm(a₁, b₁, a₂, b₂, …)   of   a ← dwconv3×3(a),  b ← irfft(rfft(b) ⊙ filter)

    `(B, C, H, W)` to the same, any size: a filter of other than the map's spectrum is resized bilinearly. `b` is a
    circular convolution over the map. Cost: O(N·C·log N). Source: arXiv 2207.14284 (raoyongming/HorNet).

    Args:
        spectrum: the learned filter's size, (H, W // 2 + 1) of the map that it is learned for.
    """

    def __init__(self, dim: int, *, spectrum: tuple[int, int] = (14, 8)) -> None:
        super().__init__()
        if dim % 2 or dim < 2:
            raise ValueError(f"dim must be even, got {dim}")
        if len(spectrum) != 2 or min(spectrum) < 1:
            raise ValueError(f"spectrum must be two positive integers, got {spectrum!r}")
        self.dim = dim
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.local = DepthwiseConv(dim // 2, 3, bias=False)
        self.filter = nn.Parameter(torch.empty(dim // 2, *spectrum, 2))  # last axis: real and imaginary part
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.filter, std=0.02)

    def circular(self, x: Tensor) -> Tensor:
        """The global half: `(B, C/2, H, W)` to the same."""
        size = x.shape[2:]
        exact = torch.promote_types(x.dtype, torch.float32)  # there is no transform in half precision
        waves = torch.fft.rfft2(x.to(exact), norm="ortho")
        weight = self.filter.to(exact)
        if weight.shape[1:3] != waves.shape[2:]:
            parts = F.interpolate(weight.permute(3, 0, 1, 2), waves.shape[2:], mode="bilinear", align_corners=True)
            weight = parts.permute(1, 2, 3, 0)
        return torch.fft.irfft2(waves * torch.view_as_complex(weight.contiguous()), s=size, norm="ortho").to(x.dtype)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """`scale` multiplies the result."""
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        a, b = self.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).chunk(2, 1)
        y = torch.stack((self.local(a).permute(0, 2, 3, 1), self.circular(b).permute(0, 2, 3, 1)), -1).flatten(3)
        last = self.norm2
        return F.layer_norm(y, (self.dim,), last.weight * scale, last.bias * scale, last.eps).permute(0, 3, 1, 2)


@register(
    Card(
        name="gnconv",
        title="HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions",
        paper="2207.14284",
        family="spatial",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
    )
)
class RecursiveGatedConv(nn.Module):
    """Multiplies `order` filtered copies of a map into it, each wider than the last: interactions of that order.

        p, q = split(Wi x);   q₀, …, qₙ₋₁ = split(s · filter(q))        p, q₀ of C/2ⁿ⁻¹ channels, …, qₙ₋₁ of C
        p ← p ⊙ q₀;   p ← (Wᵢ p) ⊙ qᵢ  for i = 1 … n-1;   y = Wo p

    `(B, C, H, W)` to the same, any size. Order 1 is a gated convolution; without biases y is homogeneous of degree
    n + 1 in x. The narrow first steps keep the cost nearly the same for all n: at most N·C·(11C/3 + 2·kernel²).
    Source: arXiv 2207.14284 (raoyongming/HorNet), whose networks have order 2 to 5 in their stages. For an isotropic
    network, `Pyramid(dims=(384,), depths=(12,), strides=(16,), block=around("gnconv"))`.

    Args:
        order: n; 2ⁿ⁻¹ must divide `dim`.
        scale: s, of the filter's output. kernel: of the depth-wise convolution that filters, odd.
        spectrum: filter by `GlobalLocalFilter` of this size instead.
    """

    def __init__(
        self,
        dim: int,
        *,
        order: int = 3,
        scale: float = 1 / 3,
        kernel: int = 7,
        spectrum: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if order < 1 or dim % 2 ** (order - 1):
            raise ValueError(f"order must be at least 1 and dim a multiple of 2^(order - 1), got {order} and {dim}")
        self.dim, self.scale = dim, scale
        self.widths = [dim >> (order - 1 - i) for i in range(order)]
        total = sum(self.widths)
        self.wi = nn.Linear(dim, 2 * dim)  # rows: p | q
        self.filter: DepthwiseConv | GlobalLocalFilter
        self.filter = DepthwiseConv(total, kernel) if spectrum is None else GlobalLocalFilter(total, spectrum=spectrum)
        self.steps = nn.ModuleList(nn.Linear(a, b) for a, b in zip(self.widths, self.widths[1:], strict=False))
        self.wo = nn.Linear(dim, dim)

    def filtered(self, q: Tensor) -> Tensor:
        """s · filter(q), `(B, C', H, W)` to the same; s goes into the weights, which are fewer."""
        if isinstance(self.filter, GlobalLocalFilter):
            return self.filter(q, scale=self.scale)
        weight, bias = self.filter.weight * self.scale, self.filter.bias
        bias = None if bias is None else bias * self.scale
        return depthwise(q, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        x, first = x.permute(0, 2, 3, 1), self.widths[0]
        # Two products, so that q lies together in memory.
        p = product(x, self.wi.weight[:first], self.wi.bias[:first])
        q = product(x, self.wi.weight[first:], self.wi.bias[first:]).permute(0, 3, 1, 2)
        factors = self.filtered(q).permute(0, 2, 3, 1).split(self.widths, -1)
        p = p * factors[0]
        for step, factor in zip(self.steps, factors[1:], strict=True):
            p = linear(p, step) * factor
        return linear(p, self.wo).permute(0, 3, 1, 2)
