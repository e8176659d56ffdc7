"""Partial convolution with attention on the channels that it leaves alone (PATNet, PartialNet)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import ANY_GRID, FEATURES, Card, register
from attnlab.nn.channel.style import StyleRecalibration
from attnlab.nn.mechanism import join_heads, split_heads
from attnlab.nn.untouched import untouched
from attnlab.positions.distance import DistanceBias


def _card(name: str, *, growth: float, cost: str, **more: object) -> Card:
    return Card(
        name=name,
        title="Partial Convolution Meets Visual Attention",
        paper="2503.03148",
        system="patnet",
        family="spatial",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost=cost,
        growth=growth,
        **more,  # type: ignore[arg-type]
    )


@register(_card("partial_conv", growth=1.0, cost="N"))
class PartialConv(nn.Module):
    """A 3×3 convolution of the first C/parts channels alone: 1/parts² of the work, and less memory to move.

        y = [conv3×3(x[: C/parts]), rest(x[C/parts :])]                 rest: as it is

    `(B, C, H, W)` to the same, any size. Cost: 9N(C/parts)². Source: arXiv 2303.03667 (FasterNet); with attention as
    the `rest`, 2503.03148.
    """

    def __init__(self, dim: int, *, parts: int = 4) -> None:
        super().__init__()
        if not 1 <= parts <= dim:
            raise ValueError(f"parts must be in [1, dim = {dim}], got {parts}")
        self.dim, self.width = dim, dim // parts
        self.conv = nn.Conv2d(self.width, self.width, 3, padding=1, bias=False)

    def rest(self, x: Tensor) -> Tensor:
        """What becomes of the channels that are not convolved."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        first, others = x.split((self.width, self.dim - self.width), 1)  # whose gradients meet in one pass
        return torch.cat((self.conv(first), self.rest(others)), 1)


@register(_card("partial_channel", growth=1.0, cost="N"))
class PartialChannel(PartialConv):
    """Partial convolution whose other channels are weighed by attention over channels (PAT_ch).

        y = [conv3×3(x[: C/parts]), bn(style(x[C/parts :]))]            style: see `StyleRecalibration`

    `(B, C, H, W)` to the same, any size. Cost: 9N(C/parts)² + O(NC). Source: arXiv 2503.03148.
    """

    def __init__(self, dim: int, *, parts: int = 4) -> None:
        super().__init__(dim, parts=parts)
        self.attention = StyleRecalibration(dim - self.width)
        self.norm = nn.BatchNorm2d(dim - self.width)

    def rest(self, x: Tensor) -> Tensor:
        norm = self.norm
        if self.training or norm.running_mean is None or norm.running_var is None or not untouched(x, *self.modules()):
            return norm(self.attention(x))
        # In evaluation the gate goes into the norm, which is then the only pass.
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift, gate = norm.bias - norm.running_mean * scale, self.attention.gate(x) * scale
        return torch.addcmul(shift[:, None, None], x, gate[:, :, None, None])


@register(_card("partial_self", growth=2.0, cost="N²", sample={"heads": 2}))
class PartialSelf(PartialConv):
    """Partial convolution whose other channels attend over all places, with biases by distance (PAT_sf).

        y = [conv3×3(x[: C/parts]), Wo attend(Wqkv layernorm(x[C/parts :])) + b]        bias[bucket(distance), head]

    `(B, C, H, W)` to the same, any size. Cost: 4N²U + 8NU² + 9N(C/parts)², U = C - C/parts. In training both the
    weights and the output are dropped out, in the authors' code at 0.1. Source: arXiv 2503.03148.
    """

    def __init__(self, dim: int, *, parts: int = 4, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__(dim, parts=parts)
        others = dim - self.width
        if heads < 1 or others % heads:
            raise ValueError(f"heads must divide the {others} channels that attend, got {heads}")
        self.heads, self.dropout = heads, dropout
        self.norm = nn.LayerNorm(others, eps=1e-6)
        self.wqkv = nn.Linear(others, 3 * others, bias=False)
        self.bias = DistanceBias(heads)
        self.wo = nn.Linear(others, others)

    def rest(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        tokens = self.norm(x.permute(0, 2, 3, 1)).flatten(1, 2)
        q, k, v = (split_heads(t, self.heads) for t in self.wqkv(tokens).chunk(3, -1))
        dropout = self.dropout if self.training else 0.0
        y = self.wo(join_heads(attend(q, k, v, bias=self.bias.on((height, width)), dropout=dropout)))
        return F.dropout(y, dropout, self.training).unflatten(1, (height, width)).permute(0, 3, 1, 2)


@register(_card("partial_spatial", growth=1.0, cost="N"))
class PartialSpatial(nn.Module):
    """One half of the channels is gated place by place, the other half mixed: attention over places (PAT_sp).

        y = [bn(a · hardsigmoid(w · a)), W bn(b)]        a, b the first and last C/2 channels; w (C/2), W (C/2, C/2)

    `(B, C, H, W)` to the same, any size. Cost: NC²/4 + NC. Source: arXiv 2503.03148.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be even, got {dim}")
        self.dim, half = dim, dim // 2
        self.score = nn.Linear(half, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(half)
        self.norm2: nn.Module = nn.BatchNorm2d(half)
        self.fc = nn.Linear(half, half, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        a, b = x.chunk(2, 1)
        gate = F.hardsigmoid(self.score(a.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        b = self.fc(self.norm2(b).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return torch.cat((self.norm1(a * gate), b), 1)

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the batch norm before the linear layer into it; in evaluation, and for it alone."""
        norm = self.norm2
        if not isinstance(norm, nn.BatchNorm2d):
            return
        if self.training or norm.running_mean is None or norm.running_var is None:
            raise ValueError("fuse needs eval(): batch norms in training depend on the batch")
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        self.fc.bias = nn.Parameter(self.fc.weight @ (norm.bias - norm.running_mean * scale))
        self.fc.weight.mul_(scale)
        self.norm2 = nn.Identity()
