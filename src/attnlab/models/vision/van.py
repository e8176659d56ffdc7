"""VAN: a pyramid of convolutions alone, whose blocks gate a map by a large kernel around each place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.local_mlp import LocalMLP
from attnlab.models.skeletons.mbconv import affine
from attnlab.models.skeletons.parts import ChannelNorm, Downsample, DropPath
from attnlab.models.skeletons.pyramid import Place, Pyramid
from attnlab.nn.spatial.large_kernel import LargeKernelMixer

_NARROW, _MIDDLE = (32, 64, 160, 256), (64, 128, 320, 512)


def _size(params: int, dims: tuple[int, ...], depths: tuple[int, ...], drop_path: float) -> Size:
    return Size(params, {"dims": dims, "depths": depths, "drop_path": drop_path})


# Parameters with 1,000 classes, as the authors' code has; drop path of the paper (b4 to b6: of b3).
SIZES = {
    "van_b0": _size(4_105_800, _NARROW, (3, 3, 5, 2), 0.1),
    "van_b1": _size(13_861_800, _MIDDLE, (2, 2, 4, 2), 0.1),
    "van_b2": _size(26_578_472, _MIDDLE, (3, 3, 12, 3), 0.1),
    "van_b3": _size(44_765_608, _MIDDLE, (3, 5, 27, 3), 0.2),
    "van_b4": _size(60_283_176, _MIDDLE, (3, 6, 40, 3), 0.2),
    "van_b5": _size(89_967_688, (96, 192, 480, 768), (3, 3, 24, 3), 0.2),
    "van_b6": _size(199_829_416, (96, 192, 384, 768), (6, 6, 90, 6), 0.2),
}


class LargeKernelBlock(nn.Module):
    """x + scale₁ mixer(norm(x)), then x + scale₂ mlp(norm(x)), with batch norms: `(B, C, H, W)` to the same.

    The mixer's own residual path adds the normed x once more.
    """

    def __init__(self, dim: int, *, mlp_ratio: float = 4.0, layer_scale: float = 0.01, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1: nn.Module = nn.BatchNorm2d(dim)
        self.mixer = LargeKernelMixer(dim)
        self.norm2: nn.Module = nn.BatchNorm2d(dim)
        self.mlp = LocalMLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.scale1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.scale2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.fused = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:  # scale1 is then the factor of x itself
            x = torch.addcmul(self.mixer.branch(x), x, self.scale1[:, None, None])
            return x + self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x + self.drop_path(self.mixer(self.norm1(x)) * self.scale1[:, None, None])
        y = self.mlp(self.norm2(x).permute(0, 2, 3, 1)) * self.scale2
        return x + self.drop_path(y.permute(0, 3, 1, 2))

    @torch.no_grad()
    def fuse(self) -> None:
        """For inference: put norms and scales into the linear layers beside them."""
        if self.fused:
            return
        mixer, mlp = self.mixer, self.mlp
        outer = ((self.norm1, mixer.wi, mixer.wo, self.scale1), (self.norm2, mlp.fc1, mlp.fc2, self.scale2))
        for norm, first, last, scale in outer:
            factor, shift = affine(norm)
            first.bias.add_(first.weight @ shift)
            first.weight.mul_(factor)
            if last is mixer.wo:  # x + scale (norm(x) + …)
                last.bias.add_(shift)
            last.bias.mul_(scale)
            last.weight.mul_(scale[:, None])
            scale.mul_(factor).add_(1.0)
        self.norm1 = self.norm2 = nn.Identity()
        self.fused = True


@register(
    Card(
        name="van",
        title="Visual Attention Network",
        paper="2202.09741",
        system="van",
        family="spatial",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
        sample={"dims": (8, 8, 12, 16), "depths": (1, 1, 2, 1), "mlp_ratios": (2, 2, 2, 2), "num_classes": 10},
        probe=(64, 40),
        sizes=SIZES,
    )
)  # fmt: skip
class VAN(Pyramid):
    """A backbone of convolutions whose blocks mix by large kernel attention: linear in pixels, any image size.

    Images `(B, in_channels, H, W)`, any size from 32² on, to logits `(B, num_classes)`; `forward_features` gives the
    map of each stage behind its layer norm. `fuse()` folds batch norms and layer scales away for inference.
    Source: arXiv 2202.09741 (Visual-Attention-Network/VAN-Classification).

    Args:
        mlp_ratios: of each stage. layer_scale: start value of the learned scale per channel of both paths.
        norm_eps: of the layer norm behind each stage.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = _NARROW,
        depths: Sequence[int] = (3, 3, 5, 2),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        layer_scale: float = 0.01,
        norm_eps: float = 1e-6,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        if len(mlp_ratios) != len(dims):
            raise ValueError(f"mlp_ratios needs one entry per stage ({len(dims)}), got {len(mlp_ratios)}")

        def block(place: Place) -> nn.Module:
            ratio = mlp_ratios[place.stage]
            return LargeKernelBlock(place.dim, mlp_ratio=ratio, layer_scale=layer_scale, drop_path=place.drop_path)

        patches = partial(Downsample, norm=nn.BatchNorm2d)
        super().__init__(
            dims=dims,
            depths=depths,
            strides=(4, *(2,) * (len(dims) - 1)),
            stem=patches(in_channels, dims[0], 4, kernel=7, padding=3),
            downsample=partial(patches, kernel=3, padding=1),
            block=block,
            stage_norm=partial(ChannelNorm, eps=norm_eps),
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
        )
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 2 / (kernel area · output channels per group)) for convolutions, 1×1 ones too; 0.02 for the head."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            elif isinstance(module, nn.Linear):
                fan_out = module.out_features
            else:
                continue
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)

    def fuse(self) -> VAN:
        """Fold batch norms and layer scales into the layers beside them, in place; in evaluation, and for it alone."""
        if self.training:
            raise ValueError("fuse needs eval(): batch norms in training depend on the batch")
        for part in list(self.modules()):
            if isinstance(part, LargeKernelBlock):
                part.fuse()
            elif isinstance(part, Downsample) and isinstance(part.norm, nn.BatchNorm2d):
                part.conv = fuse_conv_bn_eval(part.conv, part.norm)
                part.norm = nn.Identity()
        return self
