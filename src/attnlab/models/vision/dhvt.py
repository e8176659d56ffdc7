"""DHVT: a plain vision transformer with convolutions around its attention, for training on few images."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import ConvNorm, DropPath, drop_path_rates, trunc_normal_linear
from attnlab.nn.softmax.head_tokens import HeadTokens


class Affine(nn.Module):
    """A learned scale and shift per channel of a map `(B, C, H, W)`: the identity at first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])


class PatchStem(nn.Sequential):
    """Overlapping patches by 3×3 convolutions of stride 2 with batch norms, GELU between: `(B, C, H/patch, W/patch)`.

    The width doubles up to `dim`. A scale and shift per channel stand before and behind (SOPE in arXiv 2210.05958).
    """

    def __init__(self, in_channels: int, dim: int, patch: int) -> None:
        steps = patch.bit_length() - 1
        if patch < 2 or patch != 1 << steps:
            raise ValueError(f"patch must be a power of 2, such as 2, 4 or 16, got {patch}")
        if dim % (patch // 2):
            raise ValueError(f"dim must be a multiple of {patch // 2} with patch={patch}, got {dim}")
        widths = (in_channels, *(dim >> i for i in reversed(range(steps))))
        # Only a stem of one convolution has an activation behind the last, as released.
        convs = [
            ConvNorm(a, b, stride=2, activation=nn.GELU() if b < dim or steps == 1 else None)
            for a, b in pairwise(widths)
        ]
        super().__init__(Affine(in_channels), *convs, Affine(dim))


class ConvFeedForward(nn.Module):
    """A feed-forward layer that convolves the patches and lets them re-weigh the class token (DAFF).

        s = gelu(bn(W1 p));  p' = bn(W3 (s + gelu(bn(dwconv3×3(s)))))           p the patches' map
        c' = c ⊙ W5 gelu(W4 mean(p'))                                           c the class token

    x (B, 1 + H·W, C) with `grid=(H, W)` → the same. Source: arXiv 2210.05958. In `eval`, `fuse()` folds the batch
    norms into the layers before them.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.norm1 = nn.Linear(dim, hidden), nn.BatchNorm2d(hidden)
        self.conv, self.norm2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.BatchNorm2d(hidden)
        self.fc2, self.norm3 = nn.Linear(hidden, dim), nn.BatchNorm2d(dim)
        self.squeeze, self.excite = nn.Linear(dim, dim // 4), nn.Linear(dim // 4, dim)

    def forward(self, x: Tensor, *, grid: tuple[int, int]) -> Tensor:
        # A linear layer on a slice multiplies it in pieces; a copy is cheaper.
        token, places = x.split((1, x.shape[1] - 1), 1)
        places = places.contiguous().unflatten(1, grid)
        # Channels-last maps: a 1×1 convolution is a linear layer on them.
        s = F.gelu(self.norm1(self.fc1(places).permute(0, 3, 1, 2)))
        s = s + F.gelu(self.norm2(self.conv(s)))
        places = self.norm3(self.fc2(s.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        weight = self.excite(F.gelu(self.squeeze(places.mean(1, keepdim=True))))
        return torch.cat((token * weight, places), 1)

    def fuse(self) -> None:
        """Fold the batch norms into the layers before them: the same outputs in evaluation, in less time."""
        if self.training:
            raise ValueError("fuse() needs eval(): batch norms in training depend on the batch")
        pairs = (("fc1", "norm1"), ("conv", "norm2"), ("fc2", "norm3"))
        for layer, norm in ((getattr(self, a), b) for a, b in pairs):
            bn = getattr(self, norm)
            if isinstance(bn, nn.Identity):
                continue
            fold: Any = fuse_conv_bn_weights if isinstance(layer, nn.Conv2d) else fuse_linear_bn_weights
            layer.weight, layer.bias = fold(
                layer.weight, layer.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
            )
            setattr(self, norm, nn.Identity())


class DHVTBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): (B, 1 + H·W, C) → the same."""

    def __init__(self, dim: int, heads: int, hidden: int, *, bias: bool, eps: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(dim, eps), HeadTokens(dim, heads=heads, bias=bias)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps), ConvFeedForward(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, *, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x), grid=grid))


def _size(params: int, dim: int, heads: int, patch: int, classes: int) -> Size:
    return Size(params, dict(dim=dim, heads=heads, patch=patch, num_classes=classes), image=224 if patch == 16 else 32)


# Parameters as the authors' code has them: CIFAR-100's models, and ImageNet's.
SIZES = {
    "dhvt_tiny_cifar_patch4": _size(6_008_650, 192, 4, 4, 100),
    "dhvt_small_cifar_patch4": _size(23_425_450, 384, 8, 4, 100),
    "dhvt_tiny_cifar_patch2": _size(5_845_162, 192, 4, 2, 100),
    "dhvt_small_cifar_patch2": _size(22_766_698, 384, 8, 2, 100),
    "dhvt_tiny_imagenet_patch16": _size(6_267_334, 192, 3, 16, 1000),
    "dhvt_small_imagenet_patch16": _size(24_040_606, 384, 6, 16, 1000),
}


@register(
    Card(
        name="dhvt",
        title="Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets",
        paper="2210.05958",
        system="dhvt",
        family="softmax",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N²",
        sample={"dim": 16, "depth": 2, "heads": 2, "patch": 4, "num_classes": 10},
        probe=(32, 24),
        sizes=SIZES,
    )
)
class DHVT(nn.Module):
    """An image classifier for few images: convolutions give the places, and head tokens let the heads interact.

        patches by convolutions → class token → [x + head-interacted attention, x + convolving feed-forward] × depth
        logits = linear(norm(class token))

    Images `(B, in_channels, H, W)` of any size (there are no learned places) to logits `(B, num_classes)`;
    `forward_features` gives the last map. Cost O(N²), N = H·W / patch². Source: arXiv 2210.05958, whose batch norms are
    synchronised between processes in training: `nn.SyncBatchNorm.convert_sync_batchnorm(model)` does that.

    Args:
        patch: a power of 2: that many convolutions of stride 2.
        eps: of the layer norms.
    """

    def __init__(
        self,
        *,
        dim: int = 192,
        depth: int = 12,
        heads: int = 4,
        patch: int = 4,
        mlp_ratio: float = 4.0,
        bias: bool = True,
        eps: float = 1e-6,
        in_channels: int = 3,
        num_classes: int = 100,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_channels, self.channels, self.reductions = in_channels, (dim,), (patch,)
        self.stem = PatchStem(in_channels, dim, patch)
        self.class_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim), std=0.02))
        self.blocks = nn.ModuleList(
            DHVTBlock(dim, heads, int(dim * mlp_ratio), bias=bias, eps=eps, drop_path=rate)
            for rate in drop_path_rates(drop_path, depth)
        )
        self.norm = nn.LayerNorm(dim, eps)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(trunc_normal_linear)

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The tokens `(B, 1 + H·W, C)` through all blocks, and their grid."""
        if x.ndim != 4 or x.shape[1] != self.in_channels or not x.shape[2] or not x.shape[3]:
            raise ValueError(f"x must be images (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        maps = self.stem(x.contiguous(memory_format=torch.channels_last))
        grid = (maps.shape[2], maps.shape[3])
        places = maps.permute(0, 2, 3, 1).flatten(1, 2)
        tokens = torch.cat((self.class_token.expand(len(x), 1, -1), places), 1)
        for block in self.blocks:
            tokens = block(tokens, grid=grid)
        return tokens, grid

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The last map (B, dim, H/patch, W/patch), through the last norm."""
        tokens, grid = self.tokens(x)
        return [self.norm(tokens[:, 1:]).unflatten(1, grid).permute(0, 3, 1, 2)]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.tokens(x)[0][:, 0]))

    def fuse(self) -> DHVT:
        """Fold the blocks' batch norms into the layers before them, in place; for evaluation alone."""
        for block in self.blocks:
            cast(ConvFeedForward, block.mlp).fuse()
        return self
