"""The blocks of OverLoCK: a large static convolution, and one whose kernels a context of the whole map decides."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.models.skeletons.mbconv import affine
from attnlab.models.skeletons.parts import ChannelNorm, DropPath
from attnlab.nn.channel.squeeze_excite import SqueezeExcite
from attnlab.nn.conv_norm import ConvNorm
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.reparam import DilatedReparam
from attnlab.nn.spatial.context_mix import ContextMix


class PlusConv(DepthwiseConv):
    """x + dwconv3×3(x), as one convolution: `(B, C, H, W)` to the same."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + F.pad(self.weight.new_ones(1, 1), (1, 1, 1, 1))
        return F.conv2d(x, weight, self.bias, padding=1, groups=self.groups)


class GlobalResponseNorm(nn.Module):
    """(γ n + 1) x + β, where n is a channel's norm over the map relative to the channels' mean: `(B, C, H, W)` to it.

    Source: ConvNeXt V2, arXiv 2301.00808. γ and β start at 0.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        gain = self.weight[:, None, None] * (norm / (norm.mean(1, keepdim=True) + 1e-6)) + 1.0
        return torch.addcmul(self.bias[:, None, None], x, gain)


class ResponseMLP(nn.Sequential):
    """1×1 → GELU → x + dwconv3×3(x) → global response norm → 1×1: `(B, C, H, W)` to `(B, C, H, W)`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act = nn.Conv2d(dim, hidden, 1), nn.GELU()
        self.conv, self.norm = PlusConv(hidden), GlobalResponseNorm(hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)


class Residual(nn.Module):
    """x and a branch y, scaled and shifted per channel and added: s(x) + y, or x + s(y) with `on_branch`."""

    def __init__(self, dim: int, init: float | None, *, on_branch: bool = False, drop_path: float = 0.0) -> None:
        super().__init__()
        self.weight = None if init is None else nn.Parameter(torch.full((dim,), float(init)))
        self.bias = None if init is None else nn.Parameter(torch.zeros(dim))
        self.on_branch, self.drop_path = on_branch, DropPath(drop_path)

    def scaled(self, x: Tensor) -> Tensor:
        if self.weight is None or self.bias is None:
            return x
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.drop_path(self.scaled(y)) if self.on_branch else self.scaled(x) + self.drop_path(y)


class LargeKernelBlock(nn.Module):
    """x ← x + dwconv3×3(x);   s(x) + mlp(se(large(norm(x)))):  `(B, C, H, W)` to the same.

    `large` is a re-parameterised depth-wise convolution. With `scale_branch` s is on the branch instead of on x.
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel: int = 7,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        scale_branch: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv = PlusConv(dim)
        self.norm = ChannelNorm(dim, eps=1e-6)
        self.large = DilatedReparam(dim, kernel, norm=True)
        self.se = SqueezeExcite(dim, max(16, dim // 8), activation=nn.GELU)
        self.mlp = ResponseMLP(dim, int(dim * mlp_ratio))
        self.add = Residual(dim, layer_scale, on_branch=scale_branch, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.add(x, self.mlp(self.se(self.large(self.norm(x)))))


class ContextBlock(nn.Module):
    """Context mixing beside a large static convolution, gated; then an MLP: `(B, C, H, W)` to the same.

        x ← x + dwconv3×3(x);   n = norm(x);   f = n
        y = Wo bn(silu(bn(Wg f)) ⊙ se(contmix(n) + large(f)));   x ← s(x) + y
        x ← x + dwconv3×3(x);   s(x) + mlp(norm(x))

    With `context_dim`, x is `dim` channels of image and `context_dim` of context, as are the results: f is then
    fused out of both by convolutions and is what is mixed, by kernels of the image's queries and the context's regions.

    Args:
        kernel, small, heads: of `ContextMix`. mlp_ratio: of the hidden width to `dim`.
        scale_branch: s on the branches instead of on x.
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int = 0,
        kernel: int = 7,
        small: int = 5,
        heads: int = 2,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        scale_branch: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        width = dim + context_dim
        self.dim, self.context_dim = dim, context_dim
        self.conv1, self.norm1 = PlusConv(width), ChannelNorm(width, eps=1e-6)
        self.fuse_context = (
            nn.Sequential(
                DepthwiseConv(width, 3), nn.BatchNorm2d(width), nn.GELU(), nn.Conv2d(width, dim, 1),
                GlobalResponseNorm(dim),
            )
            if context_dim else None
        )  # fmt: skip
        self.mixer = ContextMix(dim, heads=heads, kernel=kernel, small=small, context_dim=context_dim or None)
        self.large = DilatedReparam(dim, kernel, norm=True)
        self.se = SqueezeExcite(dim, max(16, dim // 8), activation=nn.GELU)
        self.gate = ConvNorm(dim, dim, 1, activation=nn.SiLU())
        self.out_norm: nn.Module = nn.BatchNorm2d(dim)
        self.wo = nn.Conv2d(dim, width, 1)
        self.add1 = Residual(width, layer_scale, on_branch=scale_branch, drop_path=drop_path)
        self.conv2, self.norm2 = PlusConv(width), ChannelNorm(width, eps=1e-6)
        self.mlp = ResponseMLP(width, int(dim * mlp_ratio))
        self.add2 = Residual(width, layer_scale, on_branch=scale_branch, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        width = self.dim + self.context_dim
        if x.ndim != 4 or x.shape[1] != width or 0 in x.shape:
            raise ValueError(f"x must be (B, {width}, H, W) and not empty, got {tuple(x.shape)}")
        x = self.conv1(x)
        normed = self.norm1(x)
        if self.fuse_context is None:
            fused, mixed = normed, self.mixer(normed)
        else:
            fused = self.fuse_context(normed)
            query, context = normed.split((self.dim, self.context_dim), 1)
            mixed = self.mixer(query, context, fused)
        y = self.se(mixed + self.large(fused)) * self.gate(fused)
        x = self.conv2(self.add1(x, self.wo(self.out_norm(y))))
        return self.add2(x, self.mlp(self.norm2(x)))

    @torch.no_grad()
    def fold_out_norm(self) -> None:
        """For inference: put the batch norm before the last projection into it."""
        if isinstance(self.out_norm, nn.Identity):
            return
        factor, shift = affine(self.out_norm)
        rows = self.wo.weight.flatten(1)
        self.wo.bias = nn.Parameter(rows @ shift + (0.0 if self.wo.bias is None else self.wo.bias))
        self.wo.weight.mul_(factor[:, None, None])
        self.out_norm = nn.Identity()
